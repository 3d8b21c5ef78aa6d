"""How good the embedded world is, on the full set of emoji:

    python -m instaflow_jax.stages.embedded --model openmoji --data_dir runs/data --alpha 1 2 3 4 5

prints the numbers that the model cards quote. Not a stage: it has no config and writes nothing.
"""

import argparse

import jax
import numpy as np
from jaxtyping import Int, UInt8

from instaflow_jax import pipeline, sampling
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.models.lpips import LPIPS, VGGClassifier
from instaflow_jax.stages.evaluate.judge import Judge
from instaflow_jax.stages.pretrain.clip import retrieval, unit
from instaflow_jax.stages.pretrain.losses import psnr
from instaflow_jax.stages.pretrain.recipe import caption_tokens, in_batches, to_pixels

_BATCH = 100
_SHORTLIST = 50  # candidates that LPIPS, which compares pairs, is asked about


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the embedded models")
    parser.add_argument("--model", default="openmoji", help="embedded name, or a directory in diffusers layout")
    parser.add_argument("--data_dir", default="runs/data", help="where the emoji are, or are drawn to")
    parser.add_argument("--count", type=int, default=500, help="teacher pictures")
    parser.add_argument("--N", type=int, default=25, help="solver steps")
    parser.add_argument("--alpha", type=float, nargs="+", default=[3.0], help="guidance scales to try")
    args = parser.parse_args()
    pipe = pipeline.load(args.model, variant=None, attention="xla")
    source = pipeline.locate(args.model)
    data = openmoji.load(args.data_dir)
    autoencoder(pipe, openmoji.load(args.data_dir, split="heldout").images)
    judge, tokens = Judge(source, data), caption_tokens(data.emoji)
    report("CLIP retrieval, all full names", retrieval(unit(judge.pictures) @ unit(judge.names).T, data.emoji))
    chosen = np.random.default_rng(0).choice(len(data.emoji), args.count, replace=False)
    for alpha in args.alpha:
        made = teacher_pictures(pipe, tokens[chosen, 0], args.N, alpha)
        scores = judge.scores(judge.look(made), chosen)
        by_trunk = nearest_by_trunk(source, made, data.images)
        report(
            f"{args.count} teacher pictures, N={args.N}, alpha={alpha:g}",
            {
                "nearest_in_clip": scores["found"],
                "nearest_in_lpips": float(np.mean(judge.is_right(by_trunk, chosen))),
                "clip_score": scores["clip_score"],
            },
        )


def report(title: str, numbers: dict[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()), flush=True)


def autoencoder(pipe: pipeline.Pipeline, images: UInt8[np.ndarray, "N H W 3"]) -> None:
    """PSNR of the autoencoder on emoji it was not trained on, pixels clipped as in a picture."""
    net, params = pipe.nets["vae"], pipe.params["vae"]
    pixels = to_pixels(images)
    made = in_batches(jax.jit(lambda x: net.apply(params, x)), _BATCH, pixels).clip(-1, 1)
    mse = np.mean((made - pixels) ** 2, axis=(1, 2, 3))
    report(
        f"autoencoder, {len(images)} held-out emoji",
        {"psnr_mean": float(np.mean(psnr(mse))), "psnr_of_mean_error": float(psnr(mse.mean()))},
    )


def teacher_pictures(pipe: pipeline.Pipeline, ids: Int[np.ndarray, "N L"], N: int, alpha: float):
    """A picture for each prompt, uint8, from noise of its own seed 0, 1, ..."""
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
    solve = sampling.make_solve(pipe.nets["unet"].apply, dynamics, "auto", N, alpha)
    generate = jax.jit(sampling.make_generate(pipe.nets, solve))
    null, shape = pipe.tokenizer([""]), pipe.latent_shape

    def run(ids, seeds):
        return generate(pipe.params, ids, null, sampling.noise(seeds, shape))

    return in_batches(run, _BATCH, ids, np.arange(len(ids), dtype=np.uint32))


def nearest_by_trunk(source: str, made: UInt8[np.ndarray, "N H W 3"], images: UInt8[np.ndarray, "M H W 3"]):
    """Index of the emoji nearest in LPIPS, among the 50 nearest in the trunk's pooled features; [N]."""
    net, params = VGGClassifier.from_pretrained(source, "classifier")
    pooled = jax.jit(lambda x: net.apply(params, x, method="pooled"))
    mine, theirs = (unit(in_batches(pooled, _BATCH, to_pixels(x))) for x in (made, images))
    shortlist = np.argsort(-mine @ theirs.T, axis=1)[:, :_SHORTLIST]
    lpips, heads = LPIPS.from_pretrained(source, "lpips")
    compare = jax.jit(lambda a, b: lpips.apply(heads, a, b))
    left = to_pixels(made).repeat(_SHORTLIST, axis=0)
    distance = in_batches(compare, 10 * _BATCH, left, to_pixels(images)[shortlist.reshape(-1)])
    return shortlist[np.arange(len(made)), distance.reshape(shortlist.shape).argmin(1)]


if __name__ == "__main__":
    main()
