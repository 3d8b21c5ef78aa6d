"""One verb a file: each stage is `run(config, workdir)`, a recipe that composes models, data, training and measures.

Only here and in `main.py` a ConfigDict is seen; everything below takes plain keywords.
"""
