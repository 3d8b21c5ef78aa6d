"""Draws one image per row of token ids in ids.npy; needs only jax and numpy: `python draw.py [seed]`."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from jax import export

here = Path(__file__).parent
written = json.loads((here / "checksums.json").read_text())["files"]
for name in ("one_step.jaxexport", "weights.npz"):
    if hashlib.sha256((here / name).read_bytes()).hexdigest() != written[name]:
        sys.exit(f"error: {here / name} is damaged: its SHA-256 is not the one in checksums.json; export it again")
program = export.deserialize((here / "one_step.jaxexport").read_bytes())
weights, ids = dict(np.load(here / "weights.npz")), np.load(here / "ids.npy")
shape = (len(ids), *program.in_avals[-1].shape[1:])  # of the noise: any batch size, latents of one size
noise = np.random.default_rng(int((sys.argv[1:] or ["0"])[0])).standard_normal(shape, np.float32)
images = np.asarray(program.call(weights, ids, noise))  # uint8 [B, H, W, 3]
np.savez(here / "images.npz", noise=noise, images=images)
for i, image in enumerate(images):  # PPM: a line of text, then the bytes
    (here / f"{i}.ppm").write_bytes(b"P6 %d %d 255\n" % (image.shape[1], image.shape[0]) + image.tobytes())
print(f"drew {len(images)} images of {images.shape[2]}×{images.shape[1]} pixels into {here}")
