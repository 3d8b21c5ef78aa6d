"""How good pictures are: numbers from arrays, or from a network and its weights. Nothing here reads a config."""
