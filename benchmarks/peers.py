"""Inference by the peers, random weights: PyTorch diffusers, eager or compiled, and diffusers' last Flax classes."""

from typing import Any

import numpy as np

from benchmarks.references import references
from benchmarks.timing import Call, peak_memory

ALPHA = 7.5


def pytorch(
    *, configs: dict[str, Any], latent: int, batches: list[int], steps: int, dtype: str, device: str, compiled: bool
) -> dict[str, Call]:
    """The same calls as `sd15.ours`, with the same titles."""
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
        nets = {
            "unet": UNet2DConditionModel(**configs["unet"]),
            "vae": AutoencoderKL(**configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
    return {name: net.to(dtype).eval() for name, net in nets.items()}


def waiting(run, count: int, device: str) -> Call:
    """A call that waits for the device and reports the device's memory."""
    if device == "cpu":
        return Call(run, count, memory=peak_memory)
    cuda = references().cuda

    def run_and_wait():
        cuda.reset_peak_memory_stats()
        run()
        cuda.synchronize()

    return Call(run_and_wait, count, memory=cuda.max_memory_allocated)


class Draw:
    """Inputs for the networks, and calls that wait for the device."""

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
        return waiting(run, count, self._to["device"])


def image(draw: Draw, batch: int) -> Call:
    """Token ids to pixels in one Euler step: what the released pipeline computes, without its bookkeeping."""
    torch, nets = draw.torch, draw.nets
    X0, ids = draw.latents(batch), draw.ids(batch)
    tau = torch.full((batch,), 1000.0, device=X0.device)

    def run():
        X1 = X0 + nets["unet"](X0, tau, nets["text_encoder"](ids).last_hidden_state).sample
        pixels = (nets["vae"].decoder_only(X1) / 2 + 0.5).clamp(0, 1)
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    return draw.call(run, batch)


def teacher(draw: Draw, steps: int) -> Call:
    """diffusers' own DPM-Solver++(2M), with guidance."""
    from diffusers import DPMSolverMultistepScheduler

    torch, unet, X0, context = draw.torch, draw.nets["unet"], draw.latents(1), draw.text(2)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )

    def run():
        scheduler.set_timesteps(steps)
        z = X0
        for tau in scheduler.timesteps:
            null, text = unet(torch.cat([z, z]), tau.to(z.device), context).sample.chunk(2)
            z = scheduler.step(null + ALPHA * (text - null), tau, z).prev_sample
        return z

    return draw.call(run)


def flax(*, configs: dict[str, Any], latent: int, batches: list[int], steps: int) -> dict[str, Call]:
    """The same calls with the Flax classes of diffusers (until 0.39) and transformers (until 4.57), float32."""
    references()
    import jax
    import jax.numpy as jnp
    from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
    from transformers import CLIPTextConfig, FlaxCLIPTextModel

    rng = np.random.default_rng(0)
    unet, vae = FlaxUNet2DConditionModel(**configs["unet"]), FlaxAutoencoderKL(**configs["vae"])
    text_encoder = FlaxCLIPTextModel(CLIPTextConfig(**configs["text_encoder"]), _do_init=False)
    params = [random_weights(net.init_weights, rng) for net in (unet, vae)]
    params.append(random_weights(lambda key: text_encoder.init_weights(key, (1, 1)), rng))
    length = text_encoder.config.max_position_embeddings

    def draw(*shape: int):
        return jax.device_put(rng.standard_normal(shape, np.float32))

    def encode(p, ids):
        return text_encoder(ids, params=p)[0]

    def predict(p, z, tau, text):
        return unet.apply({"params": p}, z, tau, text).sample

    def decode(p, z):
        return vae.apply({"params": p}, z / vae.config.scaling_factor, method=vae.decode).sample

    def draw_image(params, X0, ids):
        X1 = X0 + predict(params[0], X0, jnp.full(len(X0), 1000.0), encode(params[2], ids))
        return jnp.round(255 * jnp.clip(decode(params[1], X1) / 2 + 0.5, 0, 1)).astype(jnp.uint8)

    def call(function, *inputs, count: int = 1) -> Call:
        compute = jax.jit(function)
        return Call(lambda: jax.block_until_ready(compute(*inputs)), count)

    def z(batch: int):
        return draw(batch, unet.config.in_channels, latent, latent)

    def ids(batch: int):
        return np.ones((batch, length), np.int32)

    context = draw(2, length, unet.config.cross_attention_dim)
    calls = {
        "CLIP text": call(encode, params[2], ids(1)),
        "UNet": call(predict, params[0], z(1), np.full(1, 1000.0, np.float32), context[:1]),
        "VAE decoder": call(decode, params[1], z(1)),
    }
    for batch in batches:
        calls[f"one-step image, batch {batch}"] = call(draw_image, params, z(batch), ids(batch), count=batch)
    return calls | {
        f"{steps} guided teacher step{'s' * (steps > 1)}": call(
            flax_teacher(predict, steps, z(1).shape), params[0], z(1), context
        )
    }


def flax_teacher(predict, steps: int, shape):
    """diffusers' own DPM-Solver++(2M), with guidance, as a loop inside the compiled program, like its Flax pipeline."""
    import jax
    import jax.numpy as jnp
    from diffusers import FlaxDPMSolverMultistepScheduler

    scheduler = FlaxDPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    initial = scheduler.set_timesteps(scheduler.create_state(), steps, shape)

    def step(i, carry, params, context):
        z, state = carry
        tau = jnp.asarray(state.timesteps)[i]
        null, text = jnp.split(predict(params, jnp.concatenate([z, z]), jnp.full(2, tau), context), 2)
        return scheduler.step(state, null + ALPHA * (text - null), tau, z).to_tuple()

    def solve(params, z, context):
        return jax.lax.fori_loop(0, steps, lambda i, carry: step(i, carry, params, context), (z, initial))[0]

    return solve


def random_weights(init, rng: np.random.Generator):
    """Weights scaled by fan-in; the classes' own initialisation takes minutes at full size."""
    import jax

    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    return jax.tree.map(
        lambda s: jax.device_put(rng.standard_normal(s.shape, np.float32) / np.sqrt(max(1, np.prod(s.shape[:-1])))),
        shapes,
    )
