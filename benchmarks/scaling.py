"""Memory, FLOPs and communication of the training steps, as XLA plans them for 8 devices, from shapes alone.

    python -m benchmarks.scaling [--size=sd15] [--recipes reflow:sd15 distill:sd15_l2 distill:sd15_lpips]
                                 [--fsdp 1 8 4] [--remat blocks] [--micro_batch=8]

Takes the recipes of `configs/` with SD 1.5's shapes (or the embedded ones with --size=openmoji), compiles the step that
`train.loop` would run on simulated devices, and prints a Markdown table. State and batch are shapes only, so full size
needs only the compiler's memory. Fails if the program gathers or moves what it should not.

The plan is that of XLA's CPU compiler. Arguments and outputs are the same on any device. Temporaries are not: a GPU
keeps bf16 (the CPU computes in float32), fused attention stores no probabilities, and libraries need workspace.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks import collectives
from benchmarks.references import CLIP_L_TEXT, SD15_UNET, SD15_VAE
from instaflow_jax import pipeline
from instaflow_jax.arrays import Key
from instaflow_jax.infra import cost, devices
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.lpips import LPIPS, PUBLISHED
from instaflow_jax.models.net import Net
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.train import loop, losses, optim
from instaflow_jax.train import state as train_state
from instaflow_jax.train import step as train_step
from instaflow_jax.weights.conventions import NUM_TIMESTEPS

DEVICES = 8
# XLA:CPU removes jax.checkpoint's barriers before it plans memory, so that rematerialised values are computed early.
# GPU and TPU keep the barriers, and so does the CPU with this option.
PLAN = {"xla_disable_hlo_passes": "cse_barrier_expander"}
NO_CODEGEN = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # the machine code is never run
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "lpips": LPIPS}
FULL = {"unet": SD15_UNET, "vae": SD15_VAE, "text_encoder": CLIP_L_TEXT, "lpips": PUBLISHED["vgg"]}


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled step: bytes per device, FLOPs of all devices, bytes sent, and unexpected collectives."""

    title: str
    fsdp: int
    memory: dict[str, int]
    flops: float
    sent: dict[str, float]
    unexpected: list[str]
    seconds: float


def make_nets(size: str, dtype: str) -> dict[str, Net]:
    """The networks, without weights."""
    embedded = Path(pipeline.EMBEDDED) / "openmoji"
    raw = (
        FULL
        if size == "sd15"
        else {name: json.loads((embedded / name / "config.json").read_text()) for name in CLASSES}
    )
    return {name: cls.from_config(raw[name], dtype=jnp.dtype(dtype)) for name, cls in CLASSES.items()}


def read_recipe(name: str):
    """The config behind `reflow:sd15` and the like."""
    from configs import distill, reflow

    stage, variant = name.split(":")
    return {"reflow": reflow, "distill": distill}[stage].get_config(variant).unlock()


def make_loss(config, nets: dict[str, Net]):
    """The loss as the stage builds it, and the shapes of its frozen arrays."""
    unet, text = nets["unet"].with_remat(config.remat.unet), nets["text_encoder"]
    frozen = {
        "text_encoder": text.shapes,
        "null_ids": jax.ShapeDtypeStruct((1, text.config.max_position_embeddings), jnp.int32),
    }
    if config.stage == "reflow":
        return losses.make_reflow_loss(
            unet, text, prompt_dropout=config.prompt_dropout, num_timesteps=NUM_TIMESTEPS, **config.loss
        ), frozen
    distance = losses.latent_distance
    if config.distance == "lpips":
        vae, lpips = nets["vae"].with_remat(config.remat.vae), nets["lpips"].with_remat(config.remat.lpips)
        options = {name: config.lpips[name] for name in ("l2", "crop", "margin")}
        distance = losses.make_lpips_distance(vae, lpips, **options)
        frozen |= {"vae": vae.shapes, "lpips": lpips.shapes}
    return losses.make_distill_loss(
        unet,
        text,
        distance,
        match=config.match,
        prompt_dropout=config.prompt_dropout,
        num_timesteps=NUM_TIMESTEPS,
    ), frozen


def abstract_batch(nets: dict[str, Net], batch_size: int, mesh: Mesh):
    """Pairs as the reader returns them: float16 latents and token ids."""
    unet, length = nets["unet"].config, nets["text_encoder"].config.max_position_embeddings
    latent = jax.ShapeDtypeStruct((batch_size, unet.sample_size, unet.sample_size, unet.in_channels), jnp.float16)
    ids = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    return devices.abstract_batch({"X0": latent, "X1": latent, "ids": ids}, mesh)


def replicated(tree, mesh: Mesh):
    """The same shapes, replicated on every device."""
    sharding = devices.replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def abstract_key(mesh: Mesh) -> Key:
    return replicated(jax.eval_shape(lambda: jax.random.key(0)), mesh)


def lower(config, nets: dict[str, Net], mesh: Mesh) -> tuple[jax.stages.Lowered, train_state.TrainState]:
    """The step that `train.loop.compile_step` would compile, and the shapes and shardings of its state."""
    loss, frozen = make_loss(config, nets)
    optimizer = optim.make_optimizer(optim.make_schedule(**config.schedule), **config.optim)
    state = jax.eval_shape(lambda params: train_state.create(params, optimizer), nets["unet"].shapes)
    state = devices.abstract(state, mesh)
    step = train_step.make_train_step(
        devices.gathering(loss, mesh), optimizer, ema_decay=config.ema_decay, accumulate=config.accumulate
    )
    inputs = replicated(frozen, mesh), abstract_batch(nets, config.batch_size, mesh), abstract_key(mesh)
    return loop.lower_step(step, state, *inputs, mesh), state


def measure(name: str, size: str, fsdp: int, remat: str, micro_batch: int) -> Row:
    """Compiles one recipe for all devices, with `micro_batch` samples per device and micro-batch.

    Raises:
      ValueError: the recipe's batch size is not a multiple of that.
    """
    config, mesh = read_recipe(name), devices.make_mesh(fsdp=fsdp)
    config.remat.update(dict.fromkeys(config.remat, remat))
    config.accumulate = max(1, config.batch_size // (micro_batch * mesh.size))
    devices.check_batch_size("batch_size", config.batch_size, mesh, config.accumulate)
    nets, start = make_nets(size, config.dtype), time.monotonic()
    lowered, state = lower(config, nets, mesh)
    compiled = lowered.compile(compiler_options=PLAN | NO_CODEGEN)
    seconds, memory, sent = time.monotonic() - start, compiled.memory_analysis(), collectives.read(compiled.as_text())
    sharded = [leaf.shape for leaf in state.params.values() if not leaf.sharding.is_fully_replicated]
    return Row(
        f"{name}, {config.batch_size} as {config.accumulate} × {config.batch_size // config.accumulate}, remat {remat}",
        fsdp,
        {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "donated": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        cost.step_flops(lowered, config.accumulate),
        collectives.sent_by_operation(sent),
        collectives.unexpected(sent, sharded, config.accumulate),
        seconds,
    )


def describe(row: Row) -> str:
    """A Markdown row: GiB per device, TFLOP of all devices and MiB sent per device, each per step."""
    memory = row.memory
    total = memory["arguments"] + memory["outputs"] - memory["donated"] + memory["temporaries"]
    layout = "data-parallel" if row.fsdp == 1 else f"FSDP {DEVICES // row.fsdp} × {row.fsdp}"
    gib = (f"{size / 2**30:.2f}" for size in (*memory.values(), total))
    mib = (f"{size / 2**20:,.0f}" for size in row.sent.values())
    return f"| {row.title} | {layout} | {' | '.join(gib)} | {row.flops / 1e12:,.4g} | {' | '.join(mib)} |"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="sd15", choices=("sd15", "openmoji"))
    parser.add_argument("--recipes", nargs="+", default=["reflow:sd15", "distill:sd15_l2", "distill:sd15_lpips"])
    parser.add_argument(
        "--fsdp", nargs="+", type=int, default=[1, 8, 4], help="devices that share one copy of the state"
    )
    parser.add_argument("--remat", nargs="+", default=["blocks"], choices=("none", "attention", "blocks"))
    parser.add_argument("--micro_batch", type=int, default=8, help="samples per device and micro-batch")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    print(
        "| step | layout | arguments GiB | outputs GiB | donated GiB | temporaries GiB | total GiB | TFLOP per step | "
        + " | ".join(f"{name} MiB" for name in collectives.OPERATIONS)
        + " |\n"
        + "|---" * 13
        + "|",
        flush=True,
    )
    unexpected = []
    for name, remat, fsdp in ((n, r, f) for n in options.recipes for r in options.remat for f in options.fsdp):
        row = measure(name, options.size, fsdp, remat, options.micro_batch)
        print(describe(row), flush=True)
        print(f"compiled in {row.seconds:.0f} s", file=sys.stderr, flush=True)
        unexpected += [f"{row.title}, fsdp={fsdp}: {line}" for line in row.unexpected]
        gc.collect()
    if unexpected:
        sys.exit("error: unexpected collectives\n" + "\n".join(unexpected))


if __name__ == "__main__":
    main(sys.argv[1:])
