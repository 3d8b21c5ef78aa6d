"""Data sets and what feeds training: emoji with captions, prompts, pairs, real images for evaluation."""
