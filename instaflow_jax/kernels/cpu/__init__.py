"""Convolutions for XLA's CPU backend."""
