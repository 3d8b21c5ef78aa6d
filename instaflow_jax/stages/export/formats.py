"""The formats that a model is exported in; other programs read each of them without this package."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from instaflow_jax import pipeline, sampling
from instaflow_jax.infra import checkpoint, files
from instaflow_jax.stages.common.loading import read_prompts
from instaflow_jax.stages.export import onnx, single_file, web
from instaflow_jax.stages.export.program import flat, make_one_step
from instaflow_jax.stages.export.source import Source
from instaflow_jax.weights import lora
from instaflow_jax.weights.conventions import as_released, as_stock, as_teacher, stock_factor

PLATFORMS = ("cpu", "cuda", "tpu")
CONVENTIONS = ("stock", "released")
PROGRAM = "one_step.jaxexport"
PROGRAMS = ("stablehlo", "onnx", "web")  # formats that contain the one-step program of a flow
_READER = pipeline.EMBEDDED / "draw.py"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to write.

    Attributes:
      formats: keys of `WRITERS`.
      convention: of diffusers/, "stock" or "released".
      prompts: whose token ids are written beside the StableHLO program and which the web page suggests, 'one|two' or
        a text file.
      dtype: the compute type of the StableHLO program.
      onnxruntime_web: folder of the unpacked npm package, for the format "web".
      single_file_dtype: of the weights in single_file/, "float16" or "float32".
      licence: the model's, for formats that state it.
    """

    formats: tuple[str, ...]
    convention: str
    prompts: str
    dtype: str
    onnxruntime_web: str = ""
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


def write_lora(source: Source, directory: Path, options: Options) -> None:
    """The adapters in the naming of diffusers and of kohya's trainer, for their base in `options.convention`."""
    assert source.adapters
    layers, is_flow = source.adapters.layers, isinstance(source.dynamics, sampling.Flow)
    if is_flow and options.convention == "stock":  # a target may be the last convolution, which has another scale there
        factor = np.float32(stock_factor(source.dynamics.num_timesteps))
        layers = {
            (net, name): dataclasses.replace(layer, up=factor * layer.up) if name.endswith("conv_out.kernel") else layer
            for (net, name), layer in layers.items()
        }
    directory.mkdir()
    lora.write_diffusers(layers, directory / "pytorch_lora_weights.safetensors")
    lora.write_kohya(layers, directory / "kohya.safetensors")


def abstract_inputs(pipe: pipeline.Pipeline, weights: dict[str, np.ndarray]) -> tuple:
    """Shapes of the program's inputs; the batch size is symbolic."""
    (batch,) = export.symbolic_shape("batch")
    return (
        {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()},
        jax.ShapeDtypeStruct((batch, pipe.tokenizer.model_max_length), jnp.int32),
        jax.ShapeDtypeStruct((batch, *pipe.latent_shape), jnp.float32),
    )


def write_onnx(source: Source, directory: Path, options: Options) -> None:
    """The one-step program for any batch size, its weights in a file beside it, and the tokenizer."""
    directory.mkdir()
    onnx.save(source, directory / onnx.PROGRAM, batch="batch", half=False, external=True)
    files.write_text(directory / onnx.TOKENIZER, source.pipe.tokenizer.to_json())


def write_web(source: Source, directory: Path, options: Options) -> None:
    """A page that draws in the browser."""
    directory.mkdir()
    web.save(source, directory, Path(options.onnxruntime_web), read_prompts(options.prompts))


WRITERS: dict[str, Callable[[Source, Path, Options], None]] = {
    "orbax": write_orbax,
    "diffusers": write_diffusers,
    "stablehlo": write_stablehlo,
    "msgpack": write_msgpack,
    "single_file": write_single_file,
    "onnx": write_onnx,
    "web": write_web,
    "lora": write_lora,
}
