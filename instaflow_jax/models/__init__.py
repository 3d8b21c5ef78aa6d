"""The networks: Flax ports named like their PyTorch references, and how their weights come and go."""
