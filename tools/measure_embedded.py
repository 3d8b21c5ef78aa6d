"""Measures the embedded models on the complete set of emoji:

    python -m tools.measure_embedded --model openmoji --data_dir runs/data --alpha 1 2 3 4 5

prints the numbers that the model cards quote. Not a stage: it has no config and writes nothing.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from instaflow_jax import pipeline, sampling
from instaflow_jax.arrays import TokenIds
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.evals.retrieval import retrieval, unit
from instaflow_jax.infra.images import to_pixels
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.models.lpips import LPIPS, VGGClassifier
from instaflow_jax.stages.evaluate.judge import Judge, toneless

_BATCH = 100
_SHORTLIST = 50  # candidates for LPIPS, which compares pairs

Images = UInt8[np.ndarray, "N H W 3"]


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the embedded models")
    parser.add_argument("--model", default="openmoji", help="embedded name, or a directory in diffusers layout")
    parser.add_argument("--data_dir", default="runs/data", help="holds the emoji, or they are drawn there")
    parser.add_argument("--count", type=int, default=500, help="number of teacher images")
    parser.add_argument("--N", type=int, default=25, help="solver steps")
    parser.add_argument("--alpha", type=float, nargs="+", default=[3.0], help="guidance scales to try")
    args = parser.parse_args()
    pipe = pipeline.load(args.model, variant=None, attention="xla")
    source = pipeline.locate(args.model)
    data = openmoji.load(args.data_dir)
    autoencoder(pipe, openmoji.load(args.data_dir, split="heldout").images)
    judge, ids = Judge(source, data), openmoji.caption_ids(pipe.tokenizer, data.emoji)[:, 0]
    names = {"": [emoji.name for emoji in data.emoji], "_toneless": toneless(data.emoji)}
    report("CLIP retrieval, all full names", retrieval(unit(judge.real) @ unit(judge.names).T, names))
    chosen = np.random.default_rng(0).choice(len(data.emoji), args.count, replace=False)
    for alpha in args.alpha:
        drawn = teacher_images(pipe, ids[chosen], args.N, alpha)
        scores = judge.scores(judge.image_features(drawn), chosen)
        by_lpips = nearest_by_lpips(source, drawn, data.images)
        numbers = {
            "nearest_in_clip": scores["found"],
            "nearest_in_lpips": float(np.mean(judge.is_right(by_lpips, chosen))),
            "clip_score": scores["clip_score"],
        }
        report(f"{args.count} teacher images, N={args.N}, alpha={alpha:g}", numbers)


def report(title: str, numbers: dict[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()), flush=True)


def in_batches(function: Callable, fixed: Any, *arrays: np.ndarray, batch: int = _BATCH) -> np.ndarray:
    """`function(fixed, *rows)` for all rows, on all devices."""
    runner = BatchedRunner(function, batch)
    return runner(runner.place(fixed), *arrays)


def autoencoder(pipe: pipeline.Pipeline, images: Images) -> None:
    """PSNR of the autoencoder on emoji it was not trained on, with pixels clipped to [-1, 1]."""
    pixels = to_pixels(images)
    decoded = in_batches(pipe.nets["vae"].apply, pipe.params["vae"], pixels).clip(-1, 1)
    mse = np.mean((decoded - pixels) ** 2, axis=(1, 2, 3))
    psnr = 10 * np.log10(4 / np.append(mse, mse.mean()))  # the peak-to-peak range is 2
    numbers = {"psnr_mean": float(psnr[:-1].mean()), "psnr_of_mean_error": float(psnr[-1])}
    report(f"autoencoder, {len(images)} held-out emoji", numbers)


def teacher_images(pipe: pipeline.Pipeline, ids: TokenIds, N: int, alpha: float) -> Images:
    """One image for each prompt, from noise of seeds 0, 1, ..."""
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
    solve = sampling.make_solve(pipe.nets["unet"].apply, dynamics, "auto", N, alpha)
    generate, shape = sampling.make_generate(pipe.nets, solve), pipe.latent_shape

    def run(fixed, ids, seeds):
        params, null_ids = fixed
        return generate(params, ids, null_ids, sampling.noise(seeds, shape))

    return in_batches(run, (pipe.params, pipe.tokenizer([""])), ids, np.arange(len(ids), dtype=np.uint32))


def nearest_by_lpips(source: str, drawn: Images, images: UInt8[np.ndarray, "M H W 3"]) -> Int[np.ndarray, " N"]:
    """Index of the emoji nearest in LPIPS, among the 50 nearest in the pooled features of LPIPS' trunk."""
    net, params = VGGClassifier.from_pretrained(source, "classifier")

    def pooled(params, x):
        return net.apply(params, x, method="pooled")

    mine, theirs = (unit(in_batches(pooled, params, to_pixels(x))) for x in (drawn, images))
    shortlist = np.argsort(-mine @ theirs.T, axis=1)[:, :_SHORTLIST]
    lpips, heads = LPIPS.from_pretrained(source, "lpips")
    left, right = to_pixels(drawn).repeat(_SHORTLIST, axis=0), to_pixels(images)[shortlist.reshape(-1)]
    distance = in_batches(lpips.apply, heads, left, right, batch=10 * _BATCH)
    return shortlist[np.arange(len(drawn)), distance.reshape(shortlist.shape).argmin(1)]


if __name__ == "__main__":
    main()
