"""Image quality as numbers, from arrays or from a network and its weights."""
