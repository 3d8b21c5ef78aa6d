"""What several stages share: loading models, and training."""
