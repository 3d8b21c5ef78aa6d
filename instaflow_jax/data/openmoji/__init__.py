"""The embedded data set: emoji, their captions and their images."""
