"""Full-size SD 1.5 UNet, autoencoder and CLIP-L against PyTorch, in float32 on the CPU, with random weights.

    python -m benchmarks.parity [--flax] [--latent=64] [unet vae encoder clip]

Prints a Markdown row per network: the relative L2 difference of ours from PyTorch in float32, of both from the same
PyTorch module in float64 (which shows whose rounding a difference is), and with --flax that of diffusers' and
transformers' last Flax classes. Fails if ours differs from the float64 result by more than 1e-5. The weights go
through the disk in diffusers layout. Needs about 14 GB of memory and ten minutes on two cores.
"""

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks.references import randomize, references, relative
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.net import count
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.plan.shapes import SD15

LIMIT = 1e-5
NCHW, NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def compare(name: str, reference, run, ours, method: str, inputs, flax) -> dict:
    """Differences of ours, of PyTorch and of the old Flax class, on weights that were saved and loaded.

    Args:
      run: (reference module, dtype) → numpy output, NHWC.
      inputs: our inputs.
      flax: directory → the Flax class's output; or None.
    """
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        single = run(reference, references().float32)
        references().set_default_dtype(references().float64)  # transformers creates its mask in the default dtype
        double = run(reference.double(), references().float64)
        references().set_default_dtype(references().float32)
        del reference
        gc.collect()
        net, params = ours.from_pretrained(folder)
        got = jax.block_until_ready(jax.jit(lambda p, *x: net.apply(p, *x, method=method))(params, *inputs))
        got = got.last_hidden_state if hasattr(got, "last_hidden_state") else got
        row = {
            "network": name,
            "parameters": count(params),
            "scale": float(np.std(double)),
            "ours": relative(got, single),
            "ours64": relative(got, double),
            "torch64": relative(single, double),
        }
        if flax:
            net.save_pretrained(params, Path(folder) / "flax", form="flax")
            del params
            gc.collect()
            row["flax64"] = relative(flax(str(Path(folder) / "flax")), double)
    return row


def unet(latent: int, with_flax: bool) -> dict:
    torch = references()
    from diffusers import FlaxUNet2DConditionModel
    from diffusers import UNet2DConditionModel as Reference

    x, text, tau = normal(0, 1, latent, latent, 4), normal(1, 1, 77, 768), np.array([1000.0], "float32")

    def run(reference, dtype):
        inputs = (torch.tensor(a, dtype=dtype) for a in (x.transpose(NCHW), tau, text))
        return reference(*inputs).sample.numpy().transpose(NHWC)

    def flax(folder):
        model, params = FlaxUNet2DConditionModel.from_pretrained(folder)
        call = jax.jit(lambda p, *a: model.apply({"params": p}, *a).sample)
        return np.asarray(call(params, x.transpose(NCHW), tau, text)).transpose(NHWC)

    return compare(
        "UNet",
        randomize(Reference(**SD15["unet"])),
        run,
        UNet2DConditionModel,
        "__call__",
        (x, tau, text),
        flax if with_flax else None,
    )


def vae(latent: int, with_flax: bool) -> dict:
    torch = references()
    from diffusers import AutoencoderKL as Reference
    from diffusers import FlaxAutoencoderKL

    z = normal(0, 1, latent, latent, 4)

    def run(reference, dtype):
        return reference.decode(torch.tensor(z.transpose(NCHW) / 0.18215, dtype=dtype)).sample.numpy().transpose(NHWC)

    def flax(folder):
        model, params = FlaxAutoencoderKL.from_pretrained(folder)
        call = jax.jit(lambda p, z: model.apply({"params": p}, z, method=model.decode).sample)
        return np.asarray(call(params, z.transpose(NCHW) / 0.18215)).transpose(NHWC)

    return compare(
        "VAE decoder",
        randomize(Reference(**SD15["vae"])),
        run,
        AutoencoderKL,
        "decode",
        (z,),
        flax if with_flax else None,
    )


def encoder(latent: int, with_flax: bool) -> dict:
    torch = references()
    from diffusers import AutoencoderKL as Reference

    pixels = normal(0, 1, 8 * latent, 8 * latent, 3)

    def run(reference, dtype):
        mean = reference.encode(torch.tensor(pixels.transpose(NCHW), dtype=dtype)).latent_dist.mean
        return 0.18215 * mean.numpy().transpose(NHWC)

    return compare("VAE encoder", randomize(Reference(**SD15["vae"])), run, AutoencoderKL, "encode", (pixels,), None)


def clip(latent: int, with_flax: bool) -> dict:
    torch = references()
    from transformers import CLIPTextConfig, FlaxCLIPTextModel
    from transformers import CLIPTextModel as Reference

    ids = np.random.default_rng(0).integers(0, 49406, (2, 77)).astype("int32")
    ids[:, 40:] = 49407

    def flax(folder):
        return FlaxCLIPTextModel.from_pretrained(folder)(ids).last_hidden_state

    return compare(
        "CLIP-L text",
        randomize(Reference(CLIPTextConfig(**SD15["text_encoder"]))),
        lambda reference, dtype: reference(torch.tensor(ids, dtype=torch.long)).last_hidden_state.numpy(),
        CLIPTextModel,
        "__call__",
        (ids,),
        flax if with_flax else None,
    )


NETWORKS = {"unet": unet, "vae": vae, "encoder": encoder, "clip": clip}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--latent", type=int, default=64, help="height and width of the latents; 64 is 512 pixels")
    parser.add_argument("--flax", action="store_true", help="also run the old Flax classes on the same weights")
    options = parser.parse_args()
    references().set_grad_enabled(False)
    print(
        "| network | parameters | deviation of the output | ours − PyTorch fp32 | ours − fp64 | PyTorch fp32 − fp64 "
        "| old Flax − fp64 |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    worst = 0.0
    for name in options.networks:
        row = NETWORKS[name](options.latent, options.flax)
        worst = max(worst, row["ours64"])
        errors = [f"{row[key]:.1e}" if key in row else "–" for key in ("ours", "ours64", "torch64", "flax64")]
        print(f"| {row['network']} | {row['parameters']:,} | {row['scale']:.2f} | {' | '.join(errors)} |", flush=True)
        gc.collect()
    if worst > LIMIT:
        sys.exit(f"error: the largest difference, {worst:.1e}, exceeds {LIMIT:.0e}")


if __name__ == "__main__":
    main()
