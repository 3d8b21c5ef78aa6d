"""Campaigns: wrong command lines of every stage, and flipped bits in every kind of file that we write."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_checkpoint
import test_pairs
from helpers import ROOT, read_config

from instaflow_jax import main
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.data.pairs.reader import Pairs
from instaflow_jax.infra import checkpoint, devices
from instaflow_jax.stages.common import loading
from instaflow_jax.stages.export import source as export_source

pytestmark = pytest.mark.slow

# STAGE[:VARIANT] and fields of the config, or whole flags; then what the error must name. IN is a folder of inputs.
WRONG = """
sample promts=x                                             => did you mean 'prompts'
sample:sd14                                                 => 'sd14'
sample N=many                                               => config.N
sample N=0                                                  => config.N=0
sample alpha=nan                                            => config.alpha=nan
sample alpha=1e39                                           => config.alpha=1e+39
sample seeds=(0.5,)                                         => config.seeds
sample seeds=()                                             => config.seeds
sample seeds=(4294967296,)                                  => config.seeds
sample prompts=                                             => config.prompts
sample prompts=IN/missing.txt                               => IN/missing.txt
sample prompts=IN/latin.txt                                 => IN/latin.txt
sample prompts=IN/empty.txt                                 => IN/empty.txt
sample kind=flow                                            => --config.dynamics
sample steps=4                                              => --config.N
sample model=IN/page.safetensors                            => IN/page.safetensors
sample model=IN/pointer.safetensors base=openmoji           => git lfs pull
sample model=IN/folder                                      => IN/folder
sample model=IN/missing                                     => IN/missing
sample loras=IN/missing.safetensors                         => IN/missing.safetensors
sample loras=IN/page.safetensors=much                       => 'much'
sample delta.custom=IN/missing                              => IN/missing
sample delta.custom=IN/folder delta.scale=nan               => config.delta.scale=nan
sample height=33                                            => config.height=33
sample dtype=float16                                        => config.dtype
sample solver=rk4                                           => rk4
sample negative=blue alpha=1                                => config.negative
sample attention=flash                                      => flash
sample check=perhaps                                        => config.check
sample red apple                                            => ['red', 'apple']
sample --workdr=x                                           => workdr
sample --cpu_devices=two                                    => cpu_devices
sample --processes=-2                                       => processes
sample --workdir=IN/latin.txt                               => IN/latin.txt
prompts=x                                                   => --config=configs/STAGE.py
--config=                                                   => --config
--flagfile=IN/missing                                       => IN/missing
--confg=configs/sample.py                                   => confg
--config=configs/smaple.py                                  => configs/sample.py
--config=configs                                            => configs
--config=IN/latin.txt                                       => IN/latin.txt
--config=IN/empty.txt                                       => IN/empty.txt
--config=configs/common.py                                  => configs/common.py
generate count=2147483648                                   => config.count=2147483648
generate shard_size=0                                       => config.shard_size=0
generate seed=-1                                            => config.seed=-1
generate prompts.source=IN/missing.jsonl                    => IN/missing.jsonl
generate prompts.source=IN/page.jsonl                       => IN/page.jsonl
generate prompts.source=tfds:IN/folder prompts.column=TEXT  => IN/folder
generate prompts.cleaning.max_chars=-1                      => config.prompts.cleaning.max_chars=-1
generate processes=2 process=3                              => config.process=3
generate inspect=true                                       => manifest.json
reflow optim.b1=1.5                                         => config.optim.b1=1.5
reflow schedule.peak=nan                                    => config.schedule.peak=nan
reflow schedule.name=linear                                 => linear
reflow ema_decay=2                                          => config.ema_decay=2
reflow loop.save_every=0                                    => config.loop.save_every=0
reflow loop.profile_steps=(5,)                              => config.loop.profile_steps
reflow watch.steps=(0,)                                     => --config.eval.N
reflow drop=0.1                                             => --config.prompt_dropout
reflow batch_size=8000                                      => 8000
reflow accumulate=5                                         => accumulate=5
reflow remat.unet=all                                       => config.remat.unet
reflow pairs.alpha=inf                                      => config.pairs.alpha=inf
reflow pairs.prompts.source=IN/missing.txt                  => IN/missing.txt
distill distance=l1                                         => config.distance
distill into=x                                              => --config.output
distill init_from=IN/missing                                => IN/missing
distill match=1.0                                           => config.match=1.0
distill reflow.optim.b1=1.5                                 => config.reflow.optim.b1=1.5
distill reflow.watch.steps=(0,)                             => --config.reflow.eval.N
distill reflow.schedul.peak=1.0                             => reflow.schedule.peak
distill reflow.pairs.N=0                                    => config.reflow.pairs.N=0
distill:lpips lpips.net=resnet                              => resnet
distill:lpips lpips.model=IN/folder                         => IN/folder
evaluate also=x                                             => --config.extra
evaluate extra=IN                                           => config.extra
evaluate extra=missing teacher.alpha=3.0                    => missing
evaluate                                                    => alpha
evaluate count=0 teacher.alpha=3.0                          => config.count
evaluate guidance.alphas=(nan,)                             => config.guidance.alphas
evaluate teacher.steps=(1,)                                 => --config.teacher.N
evaluate teacher.alpha=3.0 teacher.model=IN/missing         => IN/missing
evaluate teacher.alpha=3.0 judge=IN/folder                  => IN/folder
evaluate_coco                                               => coco/val2017
evaluate_coco data.source=IN/folder data.captions=IN/page.jsonl => IN/page.jsonl
evaluate_coco data.count=3                                  => config.data.count=3
evaluate_coco:coco10k                                       => 'coco10k'
export formats=('gguf',)                                    => gguf
export attention=cudnn                                      => cudnn
export model=IN/folder                                      => IN/folder
export model=openmoji                                       => config.formats
export distill.reflow.pairs.count=-4                        => config.distill.reflow.pairs.count=-4
export distill.reflow.pairs.steps=4                         => --config.distill.reflow.pairs.N
export --workdir=IN output=folder                           => IN/folder
serve port=70000                                            => config.port=70000
serve N=()                                                  => config.N
serve model=IN/missing                                      => IN/missing
serve teacher=                                              => --config.teacher
serve host=no.such.host.invalid                             => no.such.host.invalid
pretrain:unet                                               => 'unet'
pretrain augment.max_zoom=2.0                               => config.augment.max_zoom=2.0
pretrain autoencoder=IN/folder                              => IN/folder
pretrain loss.min_snr=-1.0                                  => config.loss.min_snr=-1.0
pretrain unet.block_out_channels=(64,'96')                  => config.unet.block_out_channels
pretrain unet.block_out_channels=(65,96)                    => 65
demo reflow.optim.b1=2.0                                    => reflow.optim.b1=2.0
demo direct.distance=l1                                     => config.distance
demo evaluate.extra=../x                                    => config.extra
demo export.formats=('gguf',)                               => gguf
demo distill.kind=flow                                      => distill
demo:fully                                                  => 'fully'
"""

# Imports the stages once and forks for each command line, which then runs `python -m instaflow_jax.main` to its end.
RUNNER = """
import gc, importlib, json, os, pathlib, runpy, signal, sys, warnings
from absl import app, flags, logging
import jax, ml_collections.config_flags
for path in pathlib.Path("instaflow_jax/stages").rglob("*.py"):
    if "__init__" not in path.name and "page" not in path.name:
        importlib.import_module(".".join(path.with_suffix("").parts))
import tensorflow_datasets.core, array_record.python.array_record_module
from instaflow_jax import pipeline
from instaflow_jax.data.openmoji.drawing import catalogue
catalogue(), pipeline.load("openmoji", variant=None, attention="auto")  # for the children; this makes no device
warnings.simplefilter("ignore", RuntimeWarning)  # JAX warns of forks
commands, output = json.load(sys.stdin)
running = {}
gc.freeze()  # so that the children copy less
def wait():
    pid, status = os.wait()
    pathlib.Path(output, f"{running.pop(pid)}.code").write_text(str(os.waitstatus_to_exitcode(status)))
for number, arguments in enumerate(commands):
    if len(running) == 2:
        wait()
    pid = os.fork()
    if not pid:
        signal.alarm(60)  # ends a child that was not refused
        for stream, ending in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{output}/{number}.{ending}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["main", *arguments]
        runpy.run_module("instaflow_jax.main", run_name="__main__", alter_sys=True)
        sys.exit()
    running[pid] = number
while running:
    wait()
"""


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and contents of everything below a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths}


def make_inputs(folder: Path) -> None:
    """Files that are not what their names or places promise."""
    (folder / "folder").mkdir(parents=True)
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("red apple\ncafé\n".encode("latin-1"))
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for name in ("page.safetensors", "page.jsonl", "page.parquet"):
        (folder / name).write_text("<!DOCTYPE html><html></html>\n")


def to_flags(command: str, inputs: Path, workdir: Path) -> list[str]:
    """The arguments of a line of `WRONG`."""
    words = command.replace("IN", str(inputs)).split()
    stage, *rest = words if words[0][0] != "-" and "=" not in words[0] else ["", *words]
    name, colon, variant = stage.partition(":")
    config = [f"--config=configs/{name}.py{colon}{variant}"] if stage else []
    return [
        f"--workdir={workdir}",
        *config,
        *(f"--config.{word}" if "=" in word and word[0] != "-" else word for word in rest),
    ]


def test_wrong_command_lines_end_in_one_line_and_write_nothing(tmp_path):
    inputs, output = tmp_path / "in", tmp_path / "out"
    make_inputs(inputs)
    output.mkdir()
    lines = [[part.strip() for part in line.split(" => ")] for line in WRONG.strip().splitlines()]
    commands = [to_flags(command, inputs, tmp_path / f"run{i}") for i, (command, _) in enumerate(lines)]
    before = snapshot(inputs)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([commands, str(output)]),
        cwd=ROOT,
        env=environment,
        text=True,
        check=True,
    )
    wrong = {}
    for i, (command, named) in enumerate(lines):
        error, code = ((output / f"{i}.{ending}").read_text() for ending in ("err", "code"))
        one_line = error.startswith("error: ") and error.count("\n") == 1
        written = (tmp_path / f"run{i}").exists()
        if code != "1" or not one_line or written or named.replace("IN", str(inputs)) not in error:
            wrong[command] = f"exit code {code}{', something written' if written else ''}: {error}"
    assert not wrong, "\n\n".join(f"{command}\n{what}" for command, what in wrong.items())
    assert len(lines) >= 60 and snapshot(inputs) == before


# ---------------------------------------------------------------- flipped bits


@pytest.fixture(scope="module")
def written(teacher, tmp_path_factory):
    """One of everything that we write, without what marks a checkpoint as complete."""
    root = tmp_path_factory.mktemp("written")
    test_pairs.write(root / "pairs")
    test_checkpoint.save(root / "checkpoints", [7])
    config = read_config("export")
    config.update({"model": str(teacher), "dynamics": "flow", "formats": ("diffusers", "msgpack")})
    main.run(config, str(root))
    return root


def read_pairs(root: Path) -> None:
    pairs_store.verify(root / "pairs")


def read_checkpoint(root: Path) -> None:
    mesh = devices.make_mesh(fsdp=1)
    test_checkpoint.restore(root / "checkpoints", devices.abstract(test_checkpoint.some_state(), mesh))
    checkpoint.load_config(root / "checkpoints", step=7)


def read_export(root: Path) -> None:
    for name in ("diffusers", "msgpack"):
        loading.load(str(root / "export" / name), loading.WeightOptions())
    export_source.run_config(str(root / "export" / "diffusers"))


def find_files(root: Path, kind: str) -> list[Path]:
    """The files of a kind that our readers read. TFDS's descriptions of pairs and an export's README are not read."""
    if kind == "checkpoint":
        found = test_checkpoint.files_of(root / "checkpoints")
    elif kind == "export":
        found = [path for folder in ("diffusers", "msgpack") for path in (root / "export" / folder).rglob("*")]
        found.append(root / "export" / "export.json")
    else:
        shards = [path for path in (root / "pairs").glob("*.array_record*") if path.suffix != ".json"]
        manifests = [root / "pairs" / "manifest.json", *(pairs_store.metadata_path(path) for path in shards)]
        found = shards if kind == "shards" else manifests
    return sorted(path for path in found if path.is_file() and path.stat().st_size)


FLIPS = 8  # of each kind: 32
READERS = {"shards": read_pairs, "manifests": read_pairs, "checkpoint": read_checkpoint, "export": read_export}


@pytest.mark.parametrize("kind", READERS)
def test_a_bit_flipped_anywhere_is_detected_and_its_file_named(kind, written, tmp_path):
    root = Path(shutil.copytree(written, tmp_path / "copy"))
    READERS[kind](root)
    random, paths, missed = np.random.default_rng(20), find_files(root, kind), []
    for path in random.choice(np.array(paths), FLIPS):
        before = path.read_bytes()
        position, bit = int(random.integers(len(before))), int(random.integers(8))
        damaged = bytearray(before)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            READERS[kind](root)
            missed.append(f"{path}: bit {bit} of byte {position} was not noticed")
        except (ValueError, FileNotFoundError) as error:
            if str(path) not in str(error) or "\n" in str(error):
                missed.append(f"{path}: bit {bit} of byte {position}: {error}")
        path.write_bytes(before)
    assert not missed, "\n".join(missed)
    READERS[kind](root)


def test_a_bit_flipped_in_a_shard_never_changes_what_training_reads(written, tmp_path):
    """Training reads without the checksums of whole shards; ArrayRecord has one for each record."""
    root = Path(shutil.copytree(written, tmp_path / "copy"))
    numbers = range(test_pairs.RECIPE["count"])
    right, random = Pairs(root / "pairs").batch(numbers), np.random.default_rng(21)
    for path in random.choice(np.array(find_files(root, "shards")), 20):
        before = path.read_bytes()
        damaged = bytearray(before)
        damaged[random.integers(len(before))] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        message = ""
        try:
            found = Pairs(root / "pairs").batch(numbers)
        except ValueError as error:
            found, message = right, str(error)
        assert not message or (str(path) in message and "\n" not in message)
        assert all(np.array_equal(found[name], right[name]) for name in right)
        path.write_bytes(before)
