"""Machines and disk: devices, checkpoints, metrics, images. Knows nothing of networks or of the method."""
