"""Training by the peer: the same losses written in PyTorch, on diffusers' and transformers' classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import waiting
from benchmarks.references import randomize, references
from benchmarks.timing import Call, step_title

ASSETS = Path(__file__).parent.parent / "instaflow_jax" / "assets" / "openmoji"
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def random_pairs(batch: int, latent: tuple[int, int, int], length: int, vocabulary: int = 2000) -> dict:
    """`training.pairs` as tensors, latents [batch, channels, h, w]."""
    torch = references()
    rng = np.random.default_rng(0)
    X0, X1 = (torch.tensor(x.transpose(0, 3, 1, 2)) for x in rng.standard_normal((2, batch, *latent), np.float32))
    return {"X0": X0, "X1": X1, "ids": torch.tensor(rng.integers(1, vocabulary, (batch, length)))}


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


def make_lpips(config: dict[str, Any]):
    """LPIPS on a VGG trunk as a frozen module with the keys of our files; a stage ends before each pooling.

    It takes images [B, 3, h, w] in [-1, 1] and returns distances [B]. The second image gets no gradient.
    """
    torch = references()
    from safetensors.torch import save_file

    layers, inputs, taps = [], 3, []
    for i, (width, depth) in enumerate(zip(config["widths"], config["depths"], strict=True)):
        layers += [torch.nn.MaxPool2d(2)] if i else []
        for _ in range(depth):
            layers += [torch.nn.Conv2d(inputs, width, 3, padding=1), torch.nn.ReLU()]
            inputs = width
        taps.append(len(layers) - 1)

    class Lpips(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = torch.nn.Sequential(*layers)
            for i, width in enumerate(config["widths"]):
                setattr(self, f"lin{i}", torch.nn.ModuleDict({"model": head(width)}))
            self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
            self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)

        def stages(self, x):
            x, found = (x - self.shift) / self.scale, []
            for i, layer in enumerate(self.features):
                x = layer(x)
                if i in taps:
                    found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
            return found

        def forward(self, ours, target):
            with torch.no_grad():
                theirs = self.stages(target)
            heads = [getattr(self, f"lin{i}")["model"] for i in range(len(taps))]
            stages = zip(self.stages(ours), theirs, heads, strict=True)
            return sum(head((a - b) ** 2).mean((1, 2, 3)) for a, b, head in stages)

        def save_pretrained(self, folder):
            save_file(self.state_dict(), Path(folder) / "model.safetensors")
            (Path(folder) / "config.json").write_text(json.dumps(config))

    def head(width: int):
        return torch.nn.Sequential(torch.nn.Identity(), torch.nn.Conv2d(width, 1, 1, bias=False))

    return Lpips().requires_grad_(False)


def random_lpips(config: dict[str, Any]):
    """LPIPS with random weights; those of its heads are positive, as the published ones are."""
    lpips = randomize(make_lpips(config))
    for name, weight in lpips.named_parameters():
        if name.startswith("lin"):
            weight.abs_()
    return lpips


def load_lpips():
    """LPIPS with the embedded trunk."""
    references()
    from safetensors.torch import load_file

    lpips = make_lpips(json.loads((ASSETS / "lpips/config.json").read_text()))
    weights = load_file(ASSETS / "lpips/model.safetensors")
    lpips.load_state_dict({k: v.float() for k, v in weights.items() if not k.startswith("classifier.")})
    return lpips


def reflow_loss(unet, text, pairs: dict, t, null_ids, drop: float):
    """Eq. 5 at times t [B]."""
    torch = references()
    X0, X1 = pairs["X0"], pairs["X1"]
    with torch.no_grad():
        dropped = torch.rand(len(X0), 1, device=X0.device) < drop
        context = text(torch.where(dropped, null_ids, pairs["ids"])).last_hidden_state
    s = t[:, None, None, None]
    v = unet(s * X1 + (1 - s) * X0, 1000 * (1 - t), context).sample
    return (v - (X1 - X0)).square().mean()


def lpips_loss(unet, text, vae, lpips, pairs: dict, window: slice = slice(None)):
    """Eq. 6 with LPIPS of the decoded latents, of rows and columns `window`; like ours, the step decodes the target."""
    torch = references()
    X0, X1 = pairs["X0"], pairs["X1"]
    with torch.no_grad():
        context = text(pairs["ids"]).last_hidden_state
        target = vae.decode(X1[..., window, window] / vae.config.scaling_factor).sample
    X1_hat = X0 + unet(X0, torch.full((len(X0),), 1000.0, device=X0.device), context).sample
    image = vae.decode(X1_hat[..., window, window] / vae.config.scaling_factor).sample
    return lpips(image, target).mean()


def embedded(*, batch: int) -> dict[str, Call]:
    """The same steps as `training.embedded`: gradient, clipping, AdamW, EMA."""
    torch = references()
    (unet, text, vae), lpips = load(), load_lpips()
    length = text.config.max_position_embeddings
    null_ids = torch.full((1, length), text.config.eos_token_id)
    pairs = random_pairs(batch, latent_shape(unet), length)
    losses = {
        "reflow step": lambda: reflow_loss(unet, text, pairs, torch.rand(batch), null_ids, 0.05),
        "LPIPS step": lambda: lpips_loss(unet, text, vae, lpips, pairs),
    }
    return {f"{name}, embedded, batch {batch}": training(unet, loss, batch) for name, loss in losses.items()}


def full(
    *,
    configs: dict[str, Any],
    loss: str,
    latent: int,
    batch: int,
    dtype: str,
    device: str,
    remat: str,
    crop: int,
    margin: int,
    compiled: bool,
) -> dict[str, Call]:
    """The same step as `training.full`; with autocast, and diffusers' gradient checkpointing for remat="blocks"."""
    torch = references()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device(device):
        unet = UNet2DConditionModel(**configs["unet"]).train()
        text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])).requires_grad_(False)
        vae = AutoencoderKL(**configs["vae"]).requires_grad_(False)
    lpips = random_lpips(configs["lpips"]).to(device)
    if remat == "blocks":
        unet.enable_gradient_checkpointing()
    if compiled:
        for part in (unet, text, vae.decoder, lpips):
            part.compile()
    length = text.config.max_position_embeddings
    shape = (latent, latent, unet.config.in_channels)
    pairs = {k: v.to(device) for k, v in random_pairs(batch, shape, length, text.config.vocab_size).items()}
    null_ids = torch.ones(1, length, dtype=torch.long, device=device)

    def compute():
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            if loss == "reflow":
                return reflow_loss(unet, text, pairs, torch.rand(batch, device=device), null_ids, 0.1)
            return lpips_loss(unet, text, vae, lpips, pairs, slice(crop + 2 * margin))

    return {step_title(loss, remat, batch): training(unet, compute, batch, device)}


def training(unet, loss, batch: int, device: str = "cpu") -> Call:
    torch = references()
    params = list(unet.parameters())
    fused = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(params, lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **fused)
    ema = [p.detach().clone() for p in params]

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in params], 0.01)

    return waiting(run, batch, device)


def gradient(*, configs: dict[str, Any], latent: int, batch: int, dtype: str) -> dict[str, Call]:
    """Loss and gradient of reflow on a UNet of this config, on a CPU."""
    torch = references()
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(**configs["unet"]).train()
    text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])).requires_grad_(False)
    length = text.config.max_position_embeddings
    pairs = random_pairs(batch, (latent, latent, unet.config.in_channels), length)
    null_ids = torch.ones(1, length, dtype=torch.long)

    def run():
        unet.zero_grad(set_to_none=True)
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            loss = reflow_loss(unet, text, pairs, torch.rand(batch), null_ids, 0.0)
        loss.backward()

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
