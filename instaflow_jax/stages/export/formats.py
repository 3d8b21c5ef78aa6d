"""The forms a model is written in, each for a reader that knows nothing of this package."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.infra import checkpoint, images
from instaflow_jax.stages.common.flow_training import NUM_TIMESTEPS
from instaflow_jax.stages.common.loading import read_prompts
from instaflow_jax.stages.export.source import Source, scaled

PLATFORMS = ("cpu", "cuda", "tpu")
CONVENTIONS = ("stock", "released")
PROGRAM = "one_step.jaxexport"
_READER = pipeline.EMBEDDED / "draw.py"
_ENCODER = ("encoder.", "quant_conv.")  # the half of the autoencoder that makes no pictures


def write_orbax(source: Source, directory: Path, config: ConfigDict) -> None:
    """{"unet": …, "vae": …, "text_encoder": …}, each a flat dict of arrays by dotted name, NHWC and HWIO."""
    checkpoint.save_weights(directory, source.pipe.params)


def write_diffusers(source: Source, directory: Path, config: ConfigDict) -> None:
    """A flow as `convention` says; a teacher as it is."""
    pipe = as_teacher(source.pipe)
    if isinstance(source.dynamics, sampling.Flow):
        pipe = (as_stock if config.convention == "stock" else as_released)(pipe, source.dynamics.num_timesteps)
    pipeline.save(pipe, directory)


def write_msgpack(source: Source, directory: Path, config: ConfigDict) -> None:
    """What diffusers' Flax classes read; these have no scheduler for a flow, so its convention is the released one."""
    pipe = as_teacher(source.pipe)
    if isinstance(source.dynamics, sampling.Flow):
        pipe = as_released(pipe, source.dynamics.num_timesteps)
    pipeline.save(pipe, directory, form="flax")


def write_stablehlo(source: Source, directory: Path, config: ConfigDict) -> None:
    """The one-step program for any batch, its weights, token ids to try, and a script that runs it all."""
    weights = flat(source.pipe)
    directory.mkdir()
    program = export.export(jax.jit(make_one_step(source)), platforms=PLATFORMS)(*abstract_inputs(source.pipe, weights))
    (directory / PROGRAM).write_bytes(program.serialize())
    np.savez(directory / "weights.npz", **weights)
    np.save(directory / "ids.npy", source.pipe.tokenizer(read_prompts(config.prompts)))
    shutil.copyfile(_READER, directory / "draw.py")


WRITERS: dict[str, Callable[[Source, Path, ConfigDict], None]] = {
    "orbax": write_orbax,
    "diffusers": write_diffusers,
    "stablehlo": write_stablehlo,
    "msgpack": write_msgpack,
}


# ---------------------------------------------------------------- diffusers' conventions


def as_teacher(pipe: pipeline.Pipeline) -> pipeline.Pipeline:
    """The pipeline under diffusers' own class name, its weights and scheduler as they are."""
    return dataclasses.replace(
        pipe, index=pipe.index | {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    )


def as_released(pipe: pipeline.Pipeline, steps: int) -> pipeline.Pipeline:
    """X1 − X0 and the scheduler file of the model it came from, as in the authors' checkpoints."""
    if steps != NUM_TIMESTEPS:
        raise ValueError(
            f"the released convention has a clock of {NUM_TIMESTEPS}, but this flow's counts {steps}: "
            "use config.convention='stock' and leave 'msgpack' out of config.formats"
        )
    return dataclasses.replace(pipe, index=pipe.index | {"_class_name": "RectifiedFlowPipeline"})


def as_stock(pipe: pipeline.Pipeline, steps: int) -> pipeline.Pipeline:
    """A flow that PyTorch diffusers' own classes integrate: DPM-Solver++ of order one on flow sigmas is Euler's method.

    Its sigmas begin at 1 − 1/T, so that N steps ask the clock for ⌊(T − 1)(1 − i/N)⌋ and are (1 − 1/T)/N long. Hence
    T = steps + 1, which gives the very clocks of `flow.euler` where N divides `steps`, and a last convolution that is
    T/(T − 1) larger, which gives its step lengths; it is negated because diffusers' velocity is noise − data. The
    shift of one part in 10⁹ keeps the clocks from being rounded to just below a whole number, and then down by one.
    """
    T = steps + 1
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.39.0",
        "num_train_timesteps": T,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 1 + 1e-9,
        "solver_order": 1,
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "steps_offset": 1,
    }
    return dataclasses.replace(
        pipe,
        params=pipe.params | {"unet": scaled(pipe.params["unet"], -T / (T - 1))},
        scheduler=scheduler,
        index=pipe.index | {"scheduler": ["diffusers", scheduler["_class_name"]]},
    )


# ---------------------------------------------------------------- the one-step program


def flat(pipe: pipeline.Pipeline) -> dict[str, np.ndarray]:
    """The weights that a picture takes, in one dict by "network/dotted name"."""
    return {
        f"{net}/{name}": np.asarray(array)
        for net, params in pipe.params.items()
        for name, array in params.items()
        if net != "vae" or not name.startswith(_ENCODER)
    }


def make_one_step(source: Source) -> Callable[..., jax.Array]:
    """`draw(weights, ids, X0)`: weights as `flat` names them, ids [B, L], X0 [B, h, w, c] → uint8 [B, H, W, 3]."""
    nets, shapes = source.pipe.nets, source.pipe.nets["vae"].shapes
    solve = sampling.make_solve(nets["unet"].apply, source.dynamics, "euler", 1, 1.0)
    unused = {name: jnp.zeros((), shapes[name].dtype) for name in shapes if name.startswith(_ENCODER)}

    def draw(weights, ids, X0):
        params: dict[str, dict[str, Any]] = {net: {} for net in nets}
        for key, array in weights.items():
            net, name = key.split("/", 1)
            params[net][name] = array
        text = nets["text_encoder"].apply(params["text_encoder"], ids).last_hidden_state
        X1 = solve(params["unet"], X0, text, text[:1])
        return images.to_uint8(nets["vae"].apply(params["vae"] | unused, X1, method="decode"))

    return draw


def abstract_inputs(pipe: pipeline.Pipeline, weights: dict[str, np.ndarray]) -> tuple:
    """Shapes of the program's inputs, the batch a symbol."""
    (batch,) = export.symbolic_shape("batch")
    return (
        {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()},
        jax.ShapeDtypeStruct((batch, pipe.tokenizer.model_max_length), jnp.int32),
        jax.ShapeDtypeStruct((batch, *pipe.latent_shape), jnp.float32),
    )
