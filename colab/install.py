"""Installs this package into the runtime of a notebook, beside the jax and the TensorFlow that the runtime brings.

Colab's runtimes hold a jax for their TPU or their CUDA. It stays if it is new enough; if not, a newer one for the same
TPU or CUDA replaces it. TensorFlow stays, whatever its version: tensorflow-cpu would overwrite its files.
"""

import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from glob import glob
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

CUDA = {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin"}  # what jax's extras install
TENSORFLOW = ("tensorflow", "tensorflow-cpu")


def install(root: str, extras: Sequence[str]) -> None:
    """Installs the folder `root` as `pip install -e root[extras]` does, but for what the runtime has already.

    Prints a line if the notebook must be restarted, because pip replaced a package that it had loaded.

    Raises:
      subprocess.CalledProcessError: pip failed; it says why.
    """
    pip("--no-deps", "--editable", root)
    importlib.invalidate_caches()
    found, before = versions(), loaded()
    asked, held = choose(metadata.requires("instaflow_jax") or [], extras, found, accelerator())
    try:
        pip(*asked, keep=held | before)
    except subprocess.CalledProcessError:
        print("trying again, without keeping the packages that this notebook has loaded", flush=True)
        pip(*asked, keep=held)
    importlib.invalidate_caches()
    after = versions()
    if replaced := [name for name in before if after.get(name) != before[name]]:
        print(f"Restart the runtime and run this cell again: pip replaced {', '.join(replaced)}, already loaded.")


def choose(
    requirements: Sequence[str], extras: Sequence[str], found: Mapping[str, str], accelerator: str
) -> tuple[list[str], dict[str, str]]:
    """What to ask pip for, and the versions that it must keep.

    Args:
      requirements: of the package, as in its metadata.
      found: the runtime's packages and their versions.
      accelerator: "tpu", "gpu" or "".
    """
    asked, held = [], {}
    for each in map(Requirement, requirements):
        if each.marker and not any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        if each.name in ("tensorflow-cpu", "tensorboard") and not found.keys().isdisjoint(TENSORFLOW):
            continue
        each.marker = None
        if each.name == "jax":
            held = usable_jax(each, found)
            each.extras = set() if held and has_plugin(found, accelerator) else {jax_extra(found, accelerator)} - {""}
        asked.append(str(each))
    return asked, held


def usable_jax(wanted: Requirement, found: Mapping[str, str]) -> dict[str, str]:
    """The runtime's jax with its libraries for devices, if it is new enough; else nothing."""
    if "jax" not in found or not wanted.specifier.contains(found["jax"], prereleases=True):
        return {}
    return {name: version for name, version in found.items() if re.match("jax(lib|-cuda.*)?$|libtpu$", name)}


def has_plugin(found: Mapping[str, str], accelerator: str) -> bool:
    """Whether the runtime's jax can use its accelerator."""
    needed = {"tpu": ("libtpu",), "gpu": CUDA.values()}.get(accelerator, ())
    return not needed or not found.keys().isdisjoint(needed)


def jax_extra(found: Mapping[str, str], accelerator: str) -> str:
    """jax's extra for the accelerator; for a GPU that of the CUDA which the runtime has, or CUDA 12."""
    if accelerator == "gpu":
        return next((extra for extra, plugin in CUDA.items() if plugin in found), "cuda12")
    return accelerator


def accelerator() -> str:
    """ "tpu", "gpu" or ""."""
    if glob("/dev/accel*") + glob("/dev/vfio/*"):
        return "tpu"
    return "gpu" if shutil.which("nvidia-smi") else ""


def versions() -> dict[str, str]:
    """The installed packages and their versions."""
    return {normalize(each.name): each.version for each in metadata.distributions() if each.name}


def loaded() -> dict[str, str]:
    """Those that this process has imported."""
    owners = metadata.packages_distributions()
    files = {name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None)}  # no namespaces
    names = {normalize(owner) for module in files for owner in owners.get(module, ())}
    return {name: version for name, version in versions().items() if name in names}


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(*arguments: str, keep: Mapping[str, str] | None = None) -> None:
    """Runs `pip install`, which does not replace the packages in `keep` by other versions."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "keep.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in (keep or {}).items()))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, end="", flush=True)  # so that it shows in any notebook
        done.check_returncode()
