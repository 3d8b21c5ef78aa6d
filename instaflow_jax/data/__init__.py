"""Data sets: emoji with captions, prompts, pairs, and real images for evaluation."""
