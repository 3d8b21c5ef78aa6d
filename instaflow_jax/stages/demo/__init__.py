"""The stage `demo`."""
