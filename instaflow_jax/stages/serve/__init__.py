"""The stage `serve`, a web page."""
