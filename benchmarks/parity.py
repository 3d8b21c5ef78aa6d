"""Every network against PyTorch on the same random weights, on a CPU or a GPU.

    python -m benchmarks.parity [--networks unet vae encoder clip lpips] [--flax] [--latent=64]
    python -m benchmarks.parity --device=cuda --bf16

Prints a Markdown row per network: the relative L2 difference of ours from PyTorch in float32; of both from the same
PyTorch module in float64, which shows whose rounding a difference is; with --bf16 of both in bfloat16; and with --flax
that of diffusers' and transformers' last Flax classes. Fails if ours differs from the float64 result by more than 1e-5.
The weights go through the disk in diffusers layout. At SD 1.5's size it needs about 14 GB of memory and ten minutes on
two cores.
"""

import argparse
import dataclasses
import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.references import randomize, references, relative
from benchmarks.sizes import CARD, Configs
from benchmarks.twins import random_lpips
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.lpips import LPIPS
from instaflow_jax.models.net import count
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL

LIMIT = 1e-5
NCHW, NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compared.

    Attributes:
      configs: config.json of each network.
      latent: height and width of the latents.
      device: PyTorch's; JAX takes its own default.
      bf16: also in bfloat16.
      flax: also with the old Flax classes.
    """

    configs: Configs
    latent: int
    device: str = "cpu"
    bf16: bool = False
    flax: bool = False


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def to_numpy(tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def compare(
    setting: Setting,
    name: str,
    reference,
    run: Callable,
    ours,
    method: str,
    inputs: tuple,
    flax: Callable | None = None,
) -> Row:
    """Differences of ours, of PyTorch and of the old Flax class, on weights that were saved and loaded.

    Args:
      run: (reference module, function that makes a tensor of the module's type) → numpy output, NHWC.
      inputs: our inputs.
      flax: directory → the Flax class's output.
    """
    torch = references()
    torch.backends.cudnn.allow_tf32 = False
    dtypes = {"": torch.float32, "64": torch.float64} | ({"_bf16": torch.bfloat16} if setting.bf16 else {})
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        found = {}
        for key, dtype in dtypes.items():
            torch.set_default_dtype(dtype)  # transformers creates its mask in the default dtype
            module = reference.to(setting.device, torch.float32).to(dtype)
            with torch.no_grad():
                found[key] = run(module, lambda x, dtype=dtype: torch.tensor(x, device=setting.device).to(dtype))
        torch.set_default_dtype(torch.float32)
        del reference, module
        gc.collect()
        exact = found["64"]
        got, parameters = run_ours(ours, folder, jnp.float32, method, inputs)
        row = {
            "network": name,
            "parameters": parameters,
            "scale": float(np.std(exact)),
            "ours": relative(got, found[""]),
            "ours64": relative(got, exact),
            "torch64": relative(found[""], exact),
        }
        if setting.bf16:
            row["ours_bf16"] = relative(run_ours(ours, folder, jnp.bfloat16, method, inputs)[0], exact)
            row["torch_bf16"] = relative(found["_bf16"], exact)
        if setting.flax and flax:
            net, params = ours.from_pretrained(folder)
            net.save_pretrained(params, Path(folder) / "flax", form="flax")
            del params
            gc.collect()
            row["flax64"] = relative(flax(str(Path(folder) / "flax")), exact)
    return row


def run_ours(ours, folder: str, dtype, method: str, inputs: tuple) -> tuple[np.ndarray, int]:
    """The output, and the number of parameters. float32 products are float32 on a GPU too."""
    net, params = ours.from_pretrained(folder, dtype=dtype)
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        got = jax.jit(lambda p, *x: net.apply(p, *x, method=method))(params, *inputs)
    return np.asarray(getattr(got, "last_hidden_state", got), np.float64), count(params)


def unet(setting: Setting) -> Row:
    references()
    from diffusers import UNet2DConditionModel as Reference

    latent, length = setting.latent, setting.configs["text_encoder"].get("max_position_embeddings", 77)
    x, tau = normal(0, 1, latent, latent, 4), np.array([1000.0], "float32")
    text = normal(1, 1, length, setting.configs["unet"]["cross_attention_dim"])

    def flax(folder):
        from diffusers import FlaxUNet2DConditionModel

        model, params = FlaxUNet2DConditionModel.from_pretrained(folder)
        call = jax.jit(lambda p, *a: model.apply({"params": p}, *a).sample)
        return np.asarray(call(params, x.transpose(NCHW), tau, text)).transpose(NHWC)

    return compare(
        setting,
        "UNet",
        randomize(Reference(**setting.configs["unet"])),
        lambda net, tensor: to_numpy(net(*map(tensor, (x.transpose(NCHW), tau, text))).sample).transpose(NHWC),
        UNet2DConditionModel,
        "__call__",
        (x, tau, text),
        flax,
    )


def vae(setting: Setting) -> Row:
    references()
    from diffusers import AutoencoderKL as Reference

    z = normal(0, 1, setting.latent, setting.latent, 4)

    def flax(folder):
        from diffusers import FlaxAutoencoderKL

        model, params = FlaxAutoencoderKL.from_pretrained(folder)
        call = jax.jit(lambda p, z: model.apply({"params": p}, z, method=model.decode).sample)
        return np.asarray(call(params, z.transpose(NCHW) / 0.18215)).transpose(NHWC)

    return compare(
        setting,
        "VAE decoder",
        randomize(Reference(**setting.configs["vae"])),
        lambda net, tensor: to_numpy(net.decode(tensor(z.transpose(NCHW)) / 0.18215).sample).transpose(NHWC),
        AutoencoderKL,
        "decode",
        (z,),
        flax,
    )


def encoder(setting: Setting) -> Row:
    references()
    from diffusers import AutoencoderKL as Reference

    pixels = setting.latent * 2 ** (len(setting.configs["vae"]["block_out_channels"]) - 1)
    x = normal(0, 1, pixels, pixels, 3)

    def run(net, tensor):
        return 0.18215 * to_numpy(net.encode(tensor(x.transpose(NCHW))).latent_dist.mean).transpose(NHWC)

    reference = randomize(Reference(**setting.configs["vae"]))
    return compare(setting, "VAE encoder", reference, run, AutoencoderKL, "encode", (x,))


def clip(setting: Setting) -> Row:
    torch = references()
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Reference

    config = CLIPTextConfig(**setting.configs["text_encoder"])
    length, last = config.max_position_embeddings, config.vocab_size - 1
    ids = np.random.default_rng(0).integers(0, last, (2, length)).astype("int32")
    ids[:, length // 2 + 1 :] = last

    def run(net, tensor):
        return to_numpy(net(torch.tensor(ids, dtype=torch.long, device=net.device)).last_hidden_state)

    def flax(folder):
        from transformers import FlaxCLIPTextModel

        return FlaxCLIPTextModel.from_pretrained(folder)(ids).last_hidden_state

    return compare(setting, "CLIP text", randomize(Reference(config)), run, CLIPTextModel, "__call__", (ids,), flax)


def lpips(setting: Setting) -> Row:
    pixels = setting.latent * 2 ** (len(setting.configs["vae"]["block_out_channels"]) - 1)
    a, b = (np.tanh(normal(seed, 2, pixels, pixels, 3)) for seed in (0, 1))

    def run(net, tensor):
        return to_numpy(net(*(tensor(x.transpose(NCHW)) for x in (a, b))))

    return compare(setting, "LPIPS", random_lpips(setting.configs["lpips"]), run, LPIPS, "__call__", (a, b))


NETWORKS = {"unet": unet, "vae": vae, "encoder": encoder, "clip": clip, "lpips": lpips}
COLUMNS = {
    "ours": "ours − PyTorch fp32",
    "ours64": "ours − fp64",
    "torch64": "PyTorch fp32 − fp64",
    "ours_bf16": "ours bf16 − fp64",
    "torch_bf16": "PyTorch bf16 − fp64",
    "flax64": "old Flax − fp64",
}
HEAD = ("network", "parameters", "deviation of the output", *COLUMNS.values())


def cells(row: Row) -> list[str]:
    """One line of the table."""
    errors = [f"{row[key]:.1e}" if key in row else "–" for key in COLUMNS]
    return [row["network"], f"{row['parameters']:,}", f"{row['scale']:.2f}", *errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--latent", type=int, default=64, help="height and width of the latents; 64 is 512 pixels")
    parser.add_argument("--device", default="cpu", help="PyTorch's device: cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="also in bfloat16")
    parser.add_argument("--flax", action="store_true", help="also run the old Flax classes on the same weights")
    options = parser.parse_args()
    setting = Setting(CARD.configs, options.latent, options.device, options.bf16, options.flax)
    print("\n".join(f"| {' | '.join(line)} |" for line in (HEAD, ["---"] * len(HEAD))), flush=True)
    worst = 0.0
    for name in options.networks:
        row = NETWORKS[name](setting)
        worst = max(worst, row["ours64"])
        print(f"| {' | '.join(cells(row))} |", flush=True)
        gc.collect()
    if worst > LIMIT:
        sys.exit(f"error: the largest difference, {worst:.1e}, exceeds {LIMIT:.0e}")


if __name__ == "__main__":
    main()
