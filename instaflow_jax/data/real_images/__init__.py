"""Real images with captions: from a directory or a TFDS set to latents in batches."""
