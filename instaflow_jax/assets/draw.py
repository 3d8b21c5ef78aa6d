"""Draws a picture for each row of token ids in ids.npy, with jax and numpy alone: `python draw.py [seed]`."""

import sys
from pathlib import Path

import numpy as np
from jax import export

here = Path(__file__).parent
program = export.deserialize((here / "one_step.jaxexport").read_bytes())
weights, ids = dict(np.load(here / "weights.npz")), np.load(here / "ids.npy")
shape = (len(ids), *program.in_avals[-1].shape[1:])  # of the noise: any batch, latents of one size
noise = np.random.default_rng(int((sys.argv[1:] or ["0"])[0])).standard_normal(shape, np.float32)
pictures = np.asarray(program.call(weights, ids, noise))  # uint8 [B, H, W, 3]
np.savez(here / "pictures.npz", noise=noise, pictures=pictures)
for i, picture in enumerate(pictures):  # PPM: a line of text, then the bytes
    (here / f"{i}.ppm").write_bytes(b"P6 %d %d 255\n" % (picture.shape[1], picture.shape[0]) + picture.tobytes())
print(f"drew {len(pictures)} pictures of {pictures.shape[2]}×{pictures.shape[1]} pixels into {here}")
