"""The commands of README and docs/, run as they stand: each shell block in one folder of its own, on tiny networks.

Only what a reader fills in is changed (DIR, FILE, a hub id, COCO), and numbers: steps, images, channels.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.torch
from helpers import (
    COCO_COUNT,
    FENCES,
    MAIN,
    commands_of,
    free_port,
    make_directory,
    make_tiny,
    parse,
    pretrain_config,
    references,
    shrink_demo,
    shrink_evaluate,
    shrink_training,
    small_inception,
    to_ldm,
)

from instaflow_jax import main
from instaflow_jax.evals import features
from instaflow_jax.stages.common import flow_training
from instaflow_jax.stages.evaluate_coco import measures as evaluate_coco_measure

BLOCKS = [text for language, text in FENCES if language == "bash" and commands_of(text, MAIN)]


# What a stage writes into its workdir.
PRODUCTS = {
    "sample": ("sample/*.png",),
    "generate": ("pairs/*.array_record*", "pairs/preview.png"),
    "reflow": ("reflow/export/unet/*.safetensors",),
    "distill": ("{output}/export/unet/*.safetensors",),
    "progressive": ("progressive_2/export/unet/*.safetensors", "progressive_1/export/unet/*.safetensors"),
    "evaluate": ("evaluate/table.md", "evaluate/grid.png"),
    "evaluate_coco": ("evaluate/coco/results.md", "evaluate/coco/*_N25_alpha*/results.json"),
    "export": ("export/orbax", "export/diffusers", "export/stablehlo/draw.py", "export/msgpack", "export/README.md"),
    "serve": (),
    "demo": ("report.html",),
    "pretrain": ("export/unet/*.safetensors",),
    "plan": ("plan/*.json", "plan/*.md"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, coco_folder, coco_models):
    """What a reader brings: models of random weights, files of prompts, COCO."""
    references()
    root = tmp_path_factory.mktemp("world")
    pipe = make_directory(root / "sd", "sd1")
    safetensors.torch.save_file(to_ldm(pipe, "sd1"), root / "sd.safetensors")
    make_directory(root / "custom", "sd1", seed=11)
    weight = pipe.unet.get_submodule("mid_block.resnets.0.conv1").weight
    for i, name in enumerate(("FILE", "FILE2")):
        down, up = np.random.default_rng(i).normal(size=(2, 2, 144)).astype(np.float32)
        safetensors.numpy.save_file(
            {
                "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": down.reshape(2, *weight.shape[1:]),
                "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": up[:, :16].T.reshape(16, 2, 1, 1).copy(),
            },
            root / f"{name}.safetensors",
        )
    (root / "prompts.txt").write_text("red apple\nhouse\n")
    shutil.copytree(coco_folder / "val", root / "COCO" / "val2017")
    (root / "COCO" / "annotations").mkdir()
    shutil.copy(
        coco_folder / "annotations" / "captions_val.json", root / "COCO" / "annotations" / "captions_val2017.json"
    )
    (root / "pt_inception-2015-12-05-6726825d.pth").touch()
    return SimpleNamespace(root=root, sd=root / "sd", emoji=make_tiny(root / "emoji"), coco=coco_models)


def filled_in(words, world, workdir):
    """The command with the reader's own folders and files; hub ids become directories."""
    mine = {
        "DIR_OR_HUB_ID": world.sd,
        "FILE.safetensors": world.root / "sd.safetensors",
        "DIR": workdir,
        "prompts.txt": world.root / "prompts.txt",
        "COCO/": f"{world.root}/COCO/",
        "FILE=": f"{world.root}/FILE.safetensors=",
        "FILE2=": f"{world.root}/FILE2.safetensors=",
        "pt_inception": f"{world.root}/pt_inception",
    }
    if any(word.startswith("--config.delta.custom=") for word in words):
        mine["DIR"] = world.root / "custom"

    def fill(word):
        for name, own in mine.items():  # DIR_OR_HUB_ID comes before DIR
            for before in "=|'":
                word = word.replace(f"{before}{name}", f"{before}{own}")
        return word

    return [fill(word) for word in words]


def smaller(config, world):
    """The config with small numbers, so that minutes become seconds."""
    tiny = str(world.emoji)
    if config.stage == "sample":
        config.seeds = (0,)
        if "/" in config.model and not Path(config.model).exists():
            config.model = str(world.sd)  # stands for the hub's
        if config.delta.custom:
            config.delta.origin = str(world.sd)
    if config.stage in ("reflow", "distill", "progressive", "export"):
        training = config.distill if config.stage == "export" else config
        smaller_training(training, tiny)
        if "reflow" in training:
            smaller_training(training.reflow, tiny)
    if config.stage == "generate":
        config.update({"model": tiny, "count": 8, "shard_size": 8, "batch": 4, "N": 2, "preview": 1})
    if config.stage == "evaluate":
        shrink_evaluate(config, tiny)
    if config.stage == "demo":
        shrink_demo(config, tiny)
    if config.stage == "evaluate_coco":
        model = str(world.coco / "sd")
        config.update({"model": model, "clip": str(world.coco / "clip"), "size": 16, "batch": 4, "repeats": 1})
        rows = [row.partition(",") for row in config.extra.split("|")]
        config.extra = "|".join(f"{model},{changes}" for _, _, changes in rows if changes)
        config.data.count = COCO_COUNT
    if config.stage == "plan":
        config.shapes = tiny
    if config.stage == "serve":
        config.update({"teacher": tiny, "teacher_N": 2, "port": free_port(), "N": (1,)})
    if config.stage == "pretrain":
        config.update(pretrain_config("diffusion").copy_and_resolve_references())
        config.loop.steps = 2


def smaller_training(config, tiny):
    if "rounds" in config:
        shrink_training(config, tiny).rounds = {"N": (2, 1), "steps": (2, 2)}
    else:
        shrink_training(config, tiny).loop.update({"steps": 2, "save_every": 2})
    if config.model == "openmoji":
        config.model = tiny


@pytest.fixture
def quick(monkeypatch, no_drawing):
    """A small network for Inception, a web page that closes at once, no grids, and programs that compile fast."""
    from gradio import Blocks

    monkeypatch.setattr(features, "load_inception", small_inception)
    monkeypatch.setattr(evaluate_coco_measure, "sha256_of_params", lambda weights: "of the six numbers")
    monkeypatch.setattr(Blocks, "block_thread", lambda page: page.close())
    monkeypatch.setattr(flow_training, "make_evaluate", lambda *_: lambda ema, path: {})
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: commands_of(block, MAIN)[0][3])
def test_every_line_of_a_block_runs(block, world, quick, tmp_path, monkeypatch):
    for words in commands_of(block, MAIN):
        command = filled_in(words, world, tmp_path)
        config = parse(command, monkeypatch)
        smaller(config, world)
        monkeypatch.chdir(tmp_path)
        workdir = next(
            (word.partition("=")[2] for word in command if word.startswith("--workdir=")), str(tmp_path / "runs")
        )
        main.run(config, workdir)
        for product in PRODUCTS[config.stage]:
            product = product.format(output=config.get("output"))
            assert list(Path(workdir).glob(product)), f"{' '.join(words)} made no {product}"
