"""The stage `plan`, which compiles the other stages' programs for machines that are not there."""
