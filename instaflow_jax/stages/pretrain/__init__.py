"""The stage `pretrain` and its recipes, one per network."""
