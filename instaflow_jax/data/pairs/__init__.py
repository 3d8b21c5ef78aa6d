"""Pairs (X0, prompt, X1) on disk: the manifest, the writer and the reader."""
