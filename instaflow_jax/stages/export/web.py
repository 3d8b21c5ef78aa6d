"""A static page that draws in the visitor's browser with ONNX Runtime Web, and loads nothing from other servers."""

import html
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from instaflow_jax import pipeline
from instaflow_jax.infra import files
from instaflow_jax.stages.export import onnx
from instaflow_jax.stages.export.licence import TEXTS, attribution, licence
from instaflow_jax.stages.export.program import flat
from instaflow_jax.stages.export.source import Source
from instaflow_jax.weights import ldm

ASSETS = pipeline.EMBEDDED / "web"
SCRIPT, PAGE, ORT_LICENCE = "draw.js", "index.html", "onnxruntime_LICENSE"
ORT_VERSION = "1.30.0"
ORT_FILES = {  # backend → its files in the npm package's dist/: what the page imports, and what that loads
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
}
# WASM has 4 GiB of memory, for the file, its weights in float32 (twice as large) and the activations.
LARGEST = 2**30


def save(source: Source, directory: Path, package: Path, examples: Sequence[str]) -> None:
    """Fills `directory` with the page, its script, the program, the tokenizer and ONNX Runtime Web.

    Args:
      package: folder of the unpacked npm package onnxruntime-web.
      examples: prompts that the page suggests; the first fills the prompt field.

    Raises:
      OSError: a file cannot be read or written.
    """
    onnx.save(source, directory / onnx.PROGRAM, batch=1, half=True, external=False)
    files.write_text(directory / onnx.TOKENIZER, source.pipe.tokenizer.to_json())
    shutil.copyfile(ASSETS / SCRIPT, directory / SCRIPT)
    runtime = directory / "onnxruntime"
    runtime.mkdir()
    for name in ort_names():
        shutil.copyfile(package / "dist" / name, runtime / name)
    shutil.copyfile(ASSETS / ORT_LICENCE, runtime / "LICENSE")
    fields = {
        "credits": to_html(f"Licence of the model and its images: {text_of_licence(source)}"),
        "first": html.escape(examples[0]),
        "settings": to_script(settings(source, directory, examples)),
    }
    template = Template((ASSETS / PAGE).read_text(encoding="utf-8"))
    files.write_text(directory / PAGE, template.substitute(fields))


def check(source: Source, package: str) -> None:
    """Raises ValueError if ONNX Runtime Web is not in the folder `package`, or the model does not fit into a browser.

    It does not if its weights in float16 are too many, or one of them is too large for float16.
    """
    missing = [name for name in ort_names() if not (Path(package) / "dist" / name).is_file()]
    if not package or missing:
        raise ValueError(
            f"config.onnxruntime_web={package!r} must be the unpacked npm package onnxruntime-web for the format "
            f"'web': run npm pack onnxruntime-web@{ORT_VERSION} && tar xzf onnxruntime-web-{ORT_VERSION}.tgz, and use "
            "--config.onnxruntime_web=package"
        )
    weights = flat(source.pipe)
    halved = onnx.to_halve(weights)
    try:
        ldm.check_range(halved, "float16")
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}; use the format 'onnx', which stores float32") from error
    size = sum(2 * array.size if name in halved else array.nbytes for name, array in weights.items())
    if size > LARGEST:
        raise ValueError(
            f"{source.name} has {files.format_bytes(size)} of weights in float16, too many for a browser, which takes "
            f"{files.format_bytes(LARGEST)}: use the format 'onnx' and a server"
        )


def ort_names() -> list[str]:
    """The files of ONNX Runtime Web that the page uses."""
    return [name for names in ORT_FILES.values() for name in names]


def settings(source: Source, directory: Path, examples: Sequence[str]) -> dict[str, Any]:
    """What the script reads: the shape of the noise, prompts to suggest, and each backend's files and their bytes."""
    sizes = {onnx.PROGRAM: (directory / onnx.PROGRAM).stat().st_size}
    backends = {}
    for backend, (module, _, binary) in ORT_FILES.items():
        backends[backend] = {"module": f"onnxruntime/{module}", "binary": f"onnxruntime/{binary}"}
        sizes[f"onnxruntime/{binary}"] = (directory / "onnxruntime" / binary).stat().st_size
    names = {"program": onnx.PROGRAM, "tokenizer": onnx.TOKENIZER}
    return names | {"noise": source.pipe.latent_shape, "examples": examples, "backends": backends, "bytes": sizes}


def text_of_licence(source: Source) -> str:
    """The licence and OpenMoji's attribution in Markdown, without names of folders on this machine."""
    name = licence(source).name
    return f"{TEXTS.get(name, name)}.{attribution(source)}"


def to_html(text: str) -> str:
    """Markdown's links as HTML, everything else escaped."""
    return re.sub(r"\[([^]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', html.escape(text))


def to_script(value: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value).replace("<", "\\u003c")
