"""The walls of the house: who may import whom, which package stays in one room, and what stays unloaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "instaflow_jax"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "assets" not in path.parts  # draw.py is copied beside an exported program, and runs there alone
}
FLOORS = {
    **dict.fromkeys(("__version__", "arrays", "flow", "infra"), 1),
    **dict.fromkeys(("teacher", "solvers", "kernels", "weights"), 2),
    "models": 3,
    **dict.fromkeys(("pipeline", "sampling"), 4),
    **dict.fromkeys(("data", "train", "evals"), 5),
    "stages": 6,
    "main": 7,
}
SAME_FLOOR = {("flow", "arrays"), ("infra", "arrays"), ("solvers", "teacher")}  # (importer, imported)
CHAIN = ("generate", "reflow", "distill", "export", "demo")  # a stage imports those before it
CHAINED = {stage: set(CHAIN[:i]) for i, stage in enumerate(CHAIN)}
CHAINED["demo"] |= {"evaluate", "progressive", "refine"}
CHAINED["progressive"] = {"generate"}
CHAINED["refine"] = CHAINED["control"] = {"generate", "reflow"}
CHAINED["plan"] = {"generate", "reflow", "distill", "refine", "progressive"}  # whose programs it compiles
ROOMS = {  # package: where it may be imported
    "flax": ("models/", "weights/port.py"),
    "orbax": ("infra/checkpoint.py",),
    "etils": ("infra/checkpoint.py",),
    "fsspec": ("infra/buckets.py",),
    "safetensors": ("weights/",),
    "ml_collections": ("stages/", "main.py"),
    "matplotlib": ("stages/evaluate/figures.py",),
    "gradio": ("stages/serve/page/",),
    "jax2onnx": ("stages/export/",),
    "onnx_ir": ("stages/export/onnx.py",),
    "tqdm": ("infra/progress.py",),
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
            assert node.level == 0, f"{path} has a relative import; use the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    """Dotted names of this package that a module imports, without the package's name."""
    return {name.removeprefix("instaflow_jax.") for name in imports(FILES[module]) if name.startswith("instaflow_jax.")}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down_the_floors(module):
    here = module.split(".")[0]
    for name in own_imports(module):
        there = name.split(".")[0]
        assert here != "__init__", "the package itself imports nothing"
        allowed = there == here or FLOORS[there] < FLOORS[here] or (here, there) in SAME_FLOOR
        assert allowed, f"{module} (floor {FLOORS[here]}) must not import {name} (floor {FLOORS[there]})"


@pytest.mark.parametrize("module", [module for module in FILES if module.startswith("stages.")])
def test_a_stage_imports_only_common_and_the_stages_it_chains(module):
    here = module.split(".")[1]
    allowed = {here, "common"} | CHAINED.get(here, set()) if here != "common" else {"common"}
    for name in own_imports(module):
        if name.startswith("stages."):
            assert name.split(".")[1] in allowed, f"{module} must not import {name}"


@pytest.mark.parametrize("package", ROOMS)
def test_each_dependency_stays_in_its_room(package):
    outside = [
        str(path.relative_to(PACKAGE))
        for path in FILES.values()
        if any(name.split(".")[0] == package for name in imports(path))
        and not str(path.relative_to(PACKAGE)).startswith(ROOMS[package] or ("nowhere",))
    ]
    assert not outside, f"{package} is imported in {outside}"


def test_flax_in_weights_is_only_its_serialization():
    names = {name for name in imports(FILES["weights.port"]) if name.startswith("flax")}
    assert names <= {"flax.serialization"}


def test_no_import_circles():
    """Follows imports at module level and inside functions alike."""
    edges = {}
    for module in FILES:
        names = own_imports(module)
        edges[module] = {name if name in FILES else name.rpartition(".")[0] for name in names} & FILES.keys()
    finished = set()

    def visit(module, path):
        assert module not in path, "import circle: " + " → ".join([*path[path.index(module) :], module])
        if module not in finished:
            for imported in sorted(edges[module]):
                visit(imported, [*path, module])
            finished.add(module)

    for module in FILES:
        visit(module, [])


@pytest.mark.slow
def test_nothing_runs_at_import():
    """Imports every module in a process where JAX cannot make a device, so that no array can be made."""
    pytest.importorskip("gradio")
    modules = [f"instaflow_jax.{module}" for module in FILES if module != "__init__"]
    program = f"""
import importlib
from jax._src import xla_bridge

def refuse(*_, **__):
    raise RuntimeError("a device is used at import")

xla_bridge.backends = xla_bridge.get_backend = xla_bridge._get_backend_uncached = refuse
for module in {modules!r}:
    try:
        importlib.import_module(module)
    except Exception as error:
        print(f"{{module}}: {{error!r}}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.slow
def test_importing_and_sampling_load_neither_tensorflow_nor_torch(tmp_path):
    """Draws an image with the embedded model while the packages of the extras cannot be imported."""
    program = f"""
import runpy, sys
import instaflow_jax
from instaflow_jax import main
for package in main.EXTRAS:
    sys.modules[package] = None
config = runpy.run_path("configs/sample.py")["get_config"]()
config.update(prompts="red apple", seeds=(0,), N=1)
main.run(config, {str(tmp_path)!r})
loaded = {{name for name, module in sys.modules.items() if module}}
print("loaded:", sorted({{"torch", "tensorflow", "transformers", "diffusers"}} & loaded))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert (tmp_path / "sample" / "grid.png").is_file()
