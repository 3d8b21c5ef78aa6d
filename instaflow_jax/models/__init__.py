"""The networks, as Flax modules with the attribute names of their PyTorch references."""
