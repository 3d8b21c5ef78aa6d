"""Training by the peer: the same losses written in PyTorch, on diffusers' and transformers' classes."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.references import references
from benchmarks.timing import Call

ASSETS = Path(__file__).parent.parent / "instaflow_jax" / "assets" / "openmoji"
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def random_pairs(batch: int, latent: tuple[int, int, int], length: int) -> dict:
    """`training.pairs` as tensors, latents [batch, channels, h, w]."""
    torch = references()
    rng = np.random.default_rng(0)
    X0, X1 = (torch.tensor(x.transpose(0, 3, 1, 2)) for x in rng.standard_normal((2, batch, *latent), np.float32))
    return {"X0": X0, "X1": X1, "ids": torch.tensor(rng.integers(1, 2000, (batch, length)))}


def latent_shape(unet) -> tuple[int, int, int]:
    return unet.config.sample_size, unet.config.sample_size, unet.config.in_channels


def load() -> tuple[Any, Any, Any]:
    """The embedded UNet, text encoder and autoencoder; all but the first frozen."""
    references()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    text, vae = CLIPTextModel.from_pretrained(ASSETS / "text_encoder"), AutoencoderKL.from_pretrained(ASSETS / "vae")
    return (
        UNet2DConditionModel.from_pretrained(ASSETS / "unet").train(),
        text.requires_grad_(False),
        vae.requires_grad_(False),
    )


def make_lpips():
    """LPIPS with the embedded trunk; a stage ends before each pooling."""
    torch = references()
    import json

    from safetensors.torch import load_file

    config, weights = (
        json.loads((ASSETS / "lpips/config.json").read_text()),
        load_file(ASSETS / "lpips/model.safetensors"),
    )
    layers, inputs, taps = [], 3, []
    for i, (width, depth) in enumerate(zip(config["widths"], config["depths"], strict=True)):
        layers += [torch.nn.MaxPool2d(2)] if i else []
        for _ in range(depth):
            layers += [torch.nn.Conv2d(inputs, width, 3, padding=1), torch.nn.ReLU()]
            inputs = width
        taps.append(len(layers) - 1)
    trunk = torch.nn.Sequential(*layers).requires_grad_(False)
    trunk.load_state_dict({k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")})
    heads = [weights[f"lin{i}.model.1.weight"].float() for i in range(len(taps))]
    shift, scale = (torch.tensor(x)[:, None, None] for x in (_SHIFT, _SCALE))

    def stages(x):
        x, found = (x - shift) / scale, []
        for i, layer in enumerate(trunk):
            x = layer(x)
            if i in taps:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def distance(ours, target):
        with torch.no_grad():
            theirs = stages(target)
        return sum(
            torch.nn.functional.conv2d((a - b) ** 2, head).mean()
            for a, b, head in zip(stages(ours), theirs, heads, strict=True)
        )

    return distance


def reflow_loss(unet, text, pairs: dict, t, null_ids, drop: float):
    """Eq. 5 at times t [B]."""
    torch = references()
    X0, X1 = pairs["X0"], pairs["X1"]
    with torch.no_grad():
        dropped = torch.rand(len(X0), 1) < drop
        context = text(torch.where(dropped, null_ids, pairs["ids"])).last_hidden_state
    s = t[:, None, None, None]
    v = unet(s * X1 + (1 - s) * X0, 1000 * (1 - t), context).sample
    return (v - (X1 - X0)).square().mean()


def lpips_loss(unet, text, vae, lpips, pairs: dict):
    """Eq. 6 with LPIPS of the decoded latents; like ours, the step decodes the target."""
    torch = references()
    X0, X1 = pairs["X0"], pairs["X1"]
    with torch.no_grad():
        context = text(pairs["ids"]).last_hidden_state
        target = vae.decode(X1 / vae.config.scaling_factor).sample
    X1_hat = X0 + unet(X0, torch.full((len(X0),), 1000.0), context).sample
    return lpips(vae.decode(X1_hat / vae.config.scaling_factor).sample, target)


def embedded(*, batch: int) -> dict[str, Call]:
    """The same steps as `training.embedded`: gradient, clipping, AdamW, EMA."""
    torch = references()
    (unet, text, vae), lpips = load(), make_lpips()
    length = text.config.max_position_embeddings
    null_ids = torch.full((1, length), text.config.eos_token_id)
    pairs = random_pairs(batch, latent_shape(unet), length)
    losses = {
        "reflow step": lambda: reflow_loss(unet, text, pairs, torch.rand(batch), null_ids, 0.05),
        "LPIPS step": lambda: lpips_loss(unet, text, vae, lpips, pairs),
    }
    return {f"{name}, embedded, batch {batch}": training(unet, loss, batch) for name, loss in losses.items()}


def training(unet, loss, batch: int) -> Call:
    torch = references()
    params = list(unet.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    ema = [p.detach().clone() for p in params]

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in params], 0.01)

    return Call(run, batch)


def gradient(*, configs: dict[str, Any], latent: int, batch: int, dtype: str, device: str) -> dict[str, Call]:
    """Loss and gradient of reflow on a UNet of this config; with autocast on a GPU; float32 parameters, like ours."""
    torch = references()
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device(device):
        unet = UNet2DConditionModel(**configs["unet"]).train()
        text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])).requires_grad_(False)
    length = text.config.max_position_embeddings
    pairs = {k: v.to(device) for k, v in random_pairs(batch, (latent, latent, unet.config.in_channels), length).items()}
    null_ids = torch.ones(1, length, dtype=torch.long, device=device)

    def run():
        unet.zero_grad(set_to_none=True)
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = reflow_loss(unet, text, pairs, torch.rand(batch, device=device), null_ids, 0.0)
        loss.backward()
        return loss.item()  # waits for the device

    return {f"reflow gradient, {latent}×{latent} latents, batch {batch}": Call(run, batch)}


def generation(*, batch: int, steps: int = 25, alpha: float = 3.0) -> dict[str, Call]:
    """The teacher's pairs with diffusers' own solver."""
    torch = references()
    from diffusers import DPMSolverMultistepScheduler

    unet, text, _ = load()
    scheduler = DPMSolverMultistepScheduler.from_pretrained(ASSETS / "scheduler")
    pairs = random_pairs(batch, latent_shape(unet), text.config.max_position_embeddings)
    null_ids = torch.full((batch, text.config.max_position_embeddings), text.config.eos_token_id)

    @torch.no_grad()
    def run():
        scheduler.set_timesteps(steps)
        context, z = text(torch.cat([null_ids, pairs["ids"]])).last_hidden_state, pairs["X0"]
        for tau in scheduler.timesteps:
            null, prompted = unet(torch.cat([z, z]), tau, context).sample.chunk(2)
            z = scheduler.step(null + alpha * (prompted - null), tau, z).prev_sample
        return z.half()

    return {f"{batch} pairs, embedded": Call(run, batch)}
