"""The walls of the house: who may import whom, which package lives in one room, and what stays unloaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "instaflow_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# A module imports its own floor's room and lower floors. data, train and evals are neighbours that do not meet.
FLOORS = {
    "__version__": 0,
    "arrays": 0,
    "flow": 0,
    "infra": 0,
    "models": 1,
    "teacher": 1,
    "sampling": 1,
    "data": 2,
    "train": 2,
    "evals": 2,
    "stages": 3,
    "main": 4,
}
ROOMS = {  # package: where it may be imported
    "flax": ("models/",),
    "orbax": ("infra/checkpoint.py",),
    "safetensors": ("models/port.py",),
    "ml_collections": ("stages/", "main.py"),
    "matplotlib": ("stages/evaluate_plots.py",),
    "gradio": ("stages/serve_page.py",),
    "torch": (),
    "tensorflow": (),
    "transformers": (),
    "diffusers": (),
}


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_floors(path):
    here = room(path)
    if here == "__init__":
        assert not imports(path)
        return
    for name in imports(path):
        if not name.startswith("instaflow_jax."):
            continue
        there = name.split(".")[1]
        assert there == here or FLOORS[there] < FLOORS[here] or (FLOORS[there], FLOORS[here]) in {(0, 0), (1, 1)}, (
            f"{here} (floor {FLOORS[here]}) must not import {name}"
        )


@pytest.mark.parametrize("package", ROOMS)
def test_each_dependency_stays_in_its_room(package):
    where = {
        str(path.relative_to(PACKAGE)) for path in FILES if any(name.split(".")[0] == package for name in imports(path))
    }
    strangers = {path for path in where if not path.startswith(ROOMS[package] or ("nowhere",))}
    assert not strangers, f"{package} is imported in {strangers}"


def test_importing_and_sampling_load_neither_tensorflow_nor_torch(tmp_path):
    """Draws a picture with the embedded model, then looks at what Python has loaded."""
    program = f"""
import runpy, sys
import instaflow_jax
from instaflow_jax import main
config = runpy.run_path("configs/sample.py")["get_config"]()
config.update(prompts="red apple", seeds=(0,), N=1)
main.run(config, {str(tmp_path)!r})
print("loaded:", sorted({{"torch", "tensorflow", "transformers", "diffusers"}} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert (tmp_path / "sample" / "grid.png").is_file()
