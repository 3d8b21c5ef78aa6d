"""The one-step program in ONNX, for onnxruntime on servers and in browsers.

jax2onnx converts it, an optional package that is imported only then.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from instaflow_jax import pipeline
from instaflow_jax.infra import files
from instaflow_jax.stages.export.program import flat, make_one_step
from instaflow_jax.stages.export.source import Source

PROGRAM, TOKENIZER = "one_step.onnx", "tokenizer.json"
OPSET = 20  # the first with Gelu, so that old runtimes too read it


def check_converter() -> None:
    """Converts a small function, because jax2onnx uses parts of JAX that change.

    Raises:
      ModuleNotFoundError: jax2onnx is not installed.
      ValueError: it does not work with this JAX.
    """
    try:
        import jax2onnx

        with quiet_converter():
            jax2onnx.to_onnx(jax.jit(jnp.tanh), [jax.ShapeDtypeStruct((1,), np.float32)], return_mode="ir")
    except AttributeError as error:
        raise ValueError(
            f"jax2onnx {importlib.metadata.version('jax2onnx')} does not work with jax {jax.__version__} ({error}): "
            "export 'onnx' and 'web' in an environment with an older jax, or leave them out of config.formats"
        ) from error


def save(source: Source, path: Path, *, batch: int | str, half: bool, external: bool) -> None:
    """Writes the program with its weights.

    Inputs are `ids` [batch, L] int32 and `noise` [batch, h, w, c] float32, the output `images` [batch, H, W, 3] uint8.
    It computes in float32, whatever the source was loaded for.

    Args:
      batch: a number, or a name for any number.
      half: whether to store kernels and embeddings in float16.
      external: whether to write the weights to `path`.data. A file of ONNX alone ends at 2 GB.

    Raises:
      ModuleNotFoundError: jax2onnx is not installed.
      OSError: the disk is full.
    """
    import onnx_ir

    weights = stored(source.pipe, half)
    with quiet_converter():
        model = convert(source, weights, batch)
        with files.naming(path, sum(array.nbytes for array in weights.values())):
            onnx_ir.save(model, path, external_data=f"{path.name}.data" if external else None)


def stored(pipe: pipeline.Pipeline, half: bool) -> dict[str, np.ndarray]:
    """The weights that sampling uses, as by `flat`; with `half` those of `to_halve` in float16."""
    weights = flat(pipe)
    return weights | {name: array.astype(np.float16) for name, array in to_halve(weights).items()} if half else weights


def to_halve(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The kernels and embeddings."""
    return {name: array for name, array in weights.items() if array.ndim > 1}


def convert(source: Source, weights: dict[str, np.ndarray], batch: int | str) -> Any:
    """The program as an `onnx_ir.Model`; see `save`. Raises ModuleNotFoundError if jax2onnx is not installed."""
    import jax2onnx

    pipe = source.pipe
    nets = {
        name: net.module.from_config(net.raw_config, dtype=jnp.float32, attention="xla", kernels="xla")
        for name, net in pipe.nets.items()
    }
    generate = make_one_step(dataclasses.replace(source, pipe=dataclasses.replace(pipe, nets=nets)))

    def program(ids, noise):
        return generate({k: lax.convert_element_type(w, jnp.float32) for k, w in weights.items()}, ids, noise)

    inputs = [
        jax.ShapeDtypeStruct((batch, pipe.tokenizer.model_max_length), np.int32),
        jax.ShapeDtypeStruct((batch, *pipe.latent_shape), np.float32),
    ]
    names = {"input_names": ["ids", "noise"], "output_names": ["images"], "model_name": "one_step"}
    model = jax2onnx.to_onnx(program, inputs, opset=OPSET, return_mode="ir", **names)
    drop_unread_constants(model.graph)
    return model


def drop_unread_constants(graph: Any) -> None:
    """Removes the constants that no node of an `onnx_ir.Graph` reads; onnxruntime warns of each."""
    from onnx_ir.traversal import RecursiveGraphIterator

    read = {value.name for node in RecursiveGraphIterator(graph) for value in node.inputs if value is not None}
    for name in [name for name in graph.initializers if name not in read]:
        del graph.initializers[name]


@contextlib.contextmanager
def quiet_converter() -> Iterator[None]:
    """Hides what the converter logs and warns of: its arguments, its plugins for packages that are not installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
