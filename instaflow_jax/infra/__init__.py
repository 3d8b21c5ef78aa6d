"""Machines and disk: devices, checkpoints, metrics, files and images; knows nothing of networks or flows."""
