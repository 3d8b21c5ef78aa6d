"""The peers' side of inference: PyTorch diffusers, eager or compiled, and diffusers' last Flax classes; random weights."""
from typing import Any

import numpy as np

from benchmarks.references import references
from benchmarks.timing import Call, peak_memory

ALPHA = 7.5


def pytorch(*, configs: dict[str, Any], latent: int, batches: list[int], steps: int, dtype: str, device: str,
            compiled: bool) -> dict[str, Call]:
    """The same calls as `sd15.ours`, under the same titles."""
    torch = references()
    torch.set_grad_enabled(False)
    nets = make(torch, configs, getattr(torch, dtype), device)
    if compiled:
        for part in (nets["text_encoder"], nets["unet"], nets["vae"].decoder):
            part.compile()
    nets["vae"].decoder_only = lambda z: nets["vae"].decode(z / nets["vae"].config.scaling_factor).sample
    draw = Draw(torch, nets, latent, getattr(torch, dtype), device)
    unet, z, text, ids = nets["unet"], draw.latents(1), draw.text(1), draw.ids(1)
    calls = {
        "CLIP text": draw.call(lambda: nets["text_encoder"](ids)),
        "UNet": draw.call(lambda: unet(z, torch.full((1,), 1000.0, device=device), text)),
        "VAE decoder": draw.call(lambda: nets["vae"].decoder_only(z)),
    }
    for batch in batches:
        calls[f"one-step image, batch {batch}"] = image(draw, batch)
    return calls | {f"{steps} guided teacher step{'s' * (steps > 1)}": teacher(draw, steps)}


def make(torch, configs: dict[str, Any], dtype, device: str) -> dict[str, Any]:
    """diffusers' and transformers' own classes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    with torch.device(device):
        nets = {"unet": UNet2DConditionModel(**configs["unet"]), "vae": AutoencoderKL(**configs["vae"]),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))}
    return {name: net.to(dtype).eval() for name, net in nets.items()}


class Draw:
    """Inputs for these networks, and calls that wait for the device."""

    def __init__(self, torch, nets: dict[str, Any], latent: int, dtype, device: str):
        self.torch, self.nets, self._latent, self._to = torch, nets, latent, {"dtype": dtype, "device": device}

    def latents(self, batch: int):
        return self.torch.randn(batch, self.nets["unet"].config.in_channels, self._latent, self._latent, **self._to)

    def text(self, batch: int):
        config = self.nets["text_encoder"].config
        return self.torch.randn(batch, config.max_position_embeddings, config.hidden_size, **self._to)

    def ids(self, batch: int):
        length = self.nets["text_encoder"].config.max_position_embeddings
        return self.torch.ones(batch, length, dtype=self.torch.long, device=self._to["device"])

    def call(self, run, count: int = 1) -> Call:
        if self._to["device"] == "cpu":
            return Call(run, count, memory=peak_memory)
        cuda = self.torch.cuda

        def waited():
            cuda.reset_peak_memory_stats()
            run()
            cuda.synchronize()

        return Call(waited, count, memory=cuda.max_memory_allocated)


def image(draw: Draw, batch: int) -> Call:
    """Token ids to pixels by one Euler step, plainly; what the released pipeline does without its bookkeeping."""
    torch, nets = draw.torch, draw.nets
    X0, ids = draw.latents(batch), draw.ids(batch)
    tau = torch.full((batch,), 1000.0, device=X0.device)

    def run():
        X1 = X0 + nets["unet"](X0, tau, nets["text_encoder"](ids).last_hidden_state).sample
        pixels = (nets["vae"].decoder_only(X1) / 2 + 0.5).clamp(0, 1)
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    return draw.call(run, batch)


def teacher(draw: Draw, steps: int) -> Call:
    """diffusers' own DPM-Solver++(2M) and guidance."""
    from diffusers import DPMSolverMultistepScheduler
    torch, unet, X0, context = draw.torch, draw.nets["unet"], draw.latents(1), draw.text(2)
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                            steps_offset=1)

    def run():
        scheduler.set_timesteps(steps)
        z = X0
        for tau in scheduler.timesteps:
            null, text = unet(torch.cat([z, z]), tau.to(z.device), context).sample.chunk(2)
            z = scheduler.step(null + ALPHA * (text - null), tau, z).prev_sample
        return z

    return draw.call(run)


def flax(*, configs: dict[str, Any], latent: int) -> dict[str, Call]:
    """UNet and decoder by the Flax classes that diffusers had until 0.39."""
    references()
    import jax
    from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
    rng = np.random.default_rng(0)
    unet, vae = FlaxUNet2DConditionModel(**configs["unet"]), FlaxAutoencoderKL(**configs["vae"])
    params = [random_weights(net, rng) for net in (unet, vae)]
    z = jax.device_put(rng.standard_normal((1, 4, latent, latent), np.float32))
    text = jax.device_put(rng.standard_normal((1, 77, configs["unet"]["cross_attention_dim"]), np.float32))
    tau = np.full(1, 1000.0, np.float32)
    predict = jax.jit(lambda p, *inputs: unet.apply({"params": p}, *inputs).sample)
    decode = jax.jit(lambda p, z: vae.apply({"params": p}, z / 0.18215, method=vae.decode).sample)
    return {"UNet": Call(lambda: jax.block_until_ready(predict(params[0], z, tau, text))),
            "VAE decoder": Call(lambda: jax.block_until_ready(decode(params[1], z)))}


def random_weights(net, rng: np.random.Generator):
    """As large as fan-in wants; their own initialisation takes minutes at full size."""
    import jax
    shapes = jax.eval_shape(lambda: net.init_weights(jax.random.key(0)))
    return jax.tree.map(lambda s: jax.device_put(
        rng.standard_normal(s.shape, np.float32) / np.sqrt(max(1, np.prod(s.shape[:-1])))), shapes)
