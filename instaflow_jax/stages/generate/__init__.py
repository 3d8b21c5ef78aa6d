"""The stage `generate`, which makes pairs."""
