"""The formats that a model is exported in; other programs read each of them without this package."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from instaflow_jax import pipeline, sampling
from instaflow_jax.arrays import AnyArray, Params
from instaflow_jax.infra import checkpoint, files, images
from instaflow_jax.stages.common.loading import read_prompts
from instaflow_jax.stages.export import single_file
from instaflow_jax.stages.export.source import Source
from instaflow_jax.weights.conventions import as_released, as_stock, as_teacher

PLATFORMS = ("cpu", "cuda", "tpu")
CONVENTIONS = ("stock", "released")
PROGRAM = "one_step.jaxexport"
_READER = pipeline.EMBEDDED / "draw.py"
_ENCODER = ("encoder.", "quant_conv.")  # the half of the autoencoder that sampling does not use


@dataclasses.dataclass(frozen=True)
class Options:
    """What to write.

    Attributes:
      formats: keys of `WRITERS`.
      convention: of diffusers/, "stock" or "released".
      prompts: whose token ids are written beside the StableHLO program, 'one|two' or a text file.
      dtype: the compute type of that program.
      single_file_dtype: of the weights in single_file/, "float16" or "float32".
      licence: the model's, for formats that state it.
    """

    formats: tuple[str, ...]
    convention: str
    prompts: str
    dtype: str
    single_file_dtype: str = "float16"
    licence: str = "other"


def write_orbax(source: Source, directory: Path, options: Options) -> None:
    """{"unet": …, "vae": …, "text_encoder": …}, each a flat dict of arrays by dotted name, NHWC and HWIO."""
    checkpoint.save_weights(directory, source.pipe.params)


def write_diffusers(source: Source, directory: Path, options: Options) -> None:
    """A flow in `options.convention`; a teacher unchanged."""
    pipeline.save(to_convention(source, options.convention), directory)


def write_msgpack(source: Source, directory: Path, options: Options) -> None:
    """For diffusers' Flax classes; a flow in the released convention, because these have no scheduler for flows."""
    pipeline.save(to_convention(source, "released"), directory, form="flax")


def to_convention(source: Source, convention: str) -> pipeline.Pipeline:
    """The pipeline as diffusers reads it: "stock" or "released" for a flow, unchanged for a teacher."""
    pipe, unet, scheduler = source.pipe, source.pipe.params["unet"], source.pipe.scheduler
    index = as_teacher(pipe.index)
    if isinstance(source.dynamics, sampling.Flow):
        T = source.dynamics.num_timesteps
        if convention == "stock":
            unet, scheduler, index = as_stock(unet, index, T)
        else:
            index = as_released(index, T)
    return dataclasses.replace(pipe, params=pipe.params | {"unet": unet}, scheduler=scheduler, index=index)


def write_stablehlo(source: Source, directory: Path, options: Options) -> None:
    """The one-step program for any batch size, its weights, example token ids, and a script that runs it."""
    weights = flat(source.pipe)
    directory.mkdir()
    program = export.export(jax.jit(make_one_step(source)), platforms=PLATFORMS)(*abstract_inputs(source.pipe, weights))
    files.write_bytes(directory / PROGRAM, bytes(program.serialize()))
    with files.naming(directory / "weights.npz", sum(array.nbytes for array in weights.values())):
        np.savez(directory / "weights.npz", **weights)
    np.save(directory / "ids.npy", source.pipe.tokenizer(read_prompts(options.prompts)))
    shutil.copyfile(_READER, directory / "draw.py")


def write_single_file(source: Source, directory: Path, options: Options) -> None:
    """One checkpoint in the original naming, for ComfyUI; a flow in the convention of its ModelSamplingSD3."""
    dtype, licence = options.single_file_dtype, options.licence
    single_file.write(source, directory, dtype=dtype, licence=licence, prompts=options.prompts)


WRITERS: dict[str, Callable[[Source, Path, Options], None]] = {
    "orbax": write_orbax,
    "diffusers": write_diffusers,
    "stablehlo": write_stablehlo,
    "msgpack": write_msgpack,
    "single_file": write_single_file,
}


# ---------------------------------------------------------------- the one-step program


def flat(pipe: pipeline.Pipeline) -> dict[str, np.ndarray]:
    """The weights that sampling uses, in one dict by "network/dotted name"."""
    return {
        f"{net}/{name}": np.asarray(array)
        for net, params in pipe.params.items()
        for name, array in params.items()
        if net != "vae" or not name.startswith(_ENCODER)
    }


def make_one_step(source: Source) -> Callable[[Mapping[str, AnyArray], AnyArray, AnyArray], jax.Array]:
    """`generate(weights, ids, X0)`: weights named as by `flat`, ids [B, L], X0 [B, h, w, c] → uint8 [B, H, W, 3]."""
    nets, shapes = source.pipe.nets, source.pipe.nets["vae"].shapes
    solve = sampling.make_solve(nets["unet"].apply, source.dynamics, "euler", 1, 1.0)
    unused = {name: jnp.zeros((), shapes[name].dtype) for name in shapes if name.startswith(_ENCODER)}

    def generate(weights, ids, X0):
        params: dict[str, Params] = {net: {} for net in nets}
        for key, array in weights.items():
            net, name = key.split("/", 1)
            params[net][name] = array
        text = nets["text_encoder"].apply(params["text_encoder"], ids).last_hidden_state
        X1 = solve(params["unet"], X0, text, text[:1])
        return images.to_uint8(nets["vae"].apply(params["vae"] | unused, X1, method="decode"))

    return generate


def abstract_inputs(pipe: pipeline.Pipeline, weights: dict[str, np.ndarray]) -> tuple:
    """Shapes of the program's inputs; the batch size is symbolic."""
    (batch,) = export.symbolic_shape("batch")
    return (
        {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()},
        jax.ShapeDtypeStruct((batch, pipe.tokenizer.model_max_length), jnp.int32),
        jax.ShapeDtypeStruct((batch, *pipe.latent_shape), jnp.float32),
    )
