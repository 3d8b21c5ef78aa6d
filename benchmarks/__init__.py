"""Measurements against peers; see each module's first lines for its command."""
