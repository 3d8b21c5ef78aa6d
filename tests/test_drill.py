"""The GPU drill on the CPU: its dry run, parts that fail, resuming, its tables; and the tasks for SkyPilot."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from helpers import MAIN, ROOT, parse, references

from benchmarks import drill, drill_table, parity, run, sizes, twins
from benchmarks.drill import Part
from benchmarks.sizes import DRY

TIMING = {"first": 9.0, "core_seconds": [1.0], "peak": 2**30, "count": 8}
ROW = {
    "title": "reflow step",
    "peer": "torch.compile",
    "ours": TIMING | {"seconds": [2.0], "flops": 989e12},
    "theirs": TIMING | {"seconds": [3.0], "flops": 0.0},
}


@pytest.mark.slow
def test_the_dry_run_makes_its_parts_then_has_nothing_left(tmp_path, capsys):
    command = [
        "bash",
        str(ROOT / "launch" / "gpu_drill.sh"),
        "--dry_run",
        f"--out={tmp_path}",
        "--only=card,eight",
    ]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "drill.json").read_text())
    assert found["size"] == "dry" and list(found["parts"]) == ["card", "eight devices, reflow_openmoji"]
    assert found["parts"]["eight devices, reflow_openmoji"]["plan"]["devices"] == 8
    assert "[2/2] eight devices, reflow_openmoji: at most" in done.stdout and "0 parts failed" in done.stdout
    assert "| 8 × cpu | dtype float32" in (tmp_path / "drill.md").read_text()
    assert (tmp_path / "kept.tar.gz").is_file() and (tmp_path / "kept" / "card" / "log.txt").is_file()
    assert drill.main(command[2:]) == 0
    assert capsys.readouterr().out == f"0 parts failed, 0 were not run; {tmp_path / 'drill.json'}\n"


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_is_one_line_and_the_rest_goes_on(tmp_path, capsys):
    todo = [Part("unknown", "nothing"), Part("endless", "card", minutes=0.001), Part("group", "timing", ("nowhere",))]
    found = drill.drill(todo, tmp_path, "dry", 5)["parts"]
    assert found["unknown"]["error"] == "exit code 1: KeyError: 'nothing'"
    assert found["endless"]["error"].startswith("out of time: ") and found["endless"]["seconds"] < 30
    assert found["group"]["error"] == "exit code 1: KeyError: 'nowhere'"
    assert capsys.readouterr().out.count("failed after") == 3
    assert drill.drill(todo, tmp_path, "dry", 0)["parts"] == found
    assert "3 parts are left and the time is over: run the same command again" in capsys.readouterr().out


def test_parts_that_were_never_tried_come_before_failed_ones(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(drill, "run_part", lambda part, *_: tried.append(part.name) or {"seconds": 1.0})
    drill.save(tmp_path, {"size": "dry", "cards": "none", "parts": {"a": {"seconds": 1.0, "error": "lost"}}})
    drill.drill([Part("a", "card"), Part("b", "card")], tmp_path, "dry", 5)
    assert tried == ["b", "a"]


def test_results_of_another_card_are_not_continued(tmp_path):
    drill.save(tmp_path, {"size": "card", "cards": "NVIDIA H100", "parts": {}})
    with pytest.raises(ValueError, match="has size='card', this run 'dry'; use another --out"):
        drill.drill([], tmp_path, "dry", 5)


def test_every_part_has_its_function_and_fits_the_time():
    for dry_run in (False, True):
        found = drill.parts(dry_run)
        assert len({part.name for part in found}) == len({drill.slug(part.name) for part in found}) == len(found)
        assert all(part.minutes < 10 for part in found)
    groups = run.gpu(True, sizes.CARD)
    assert {*sizes.CARD.telling} < {*groups} < {part.name for part in drill.parts(False)}
    assert [part.name for part in drill.choose(found, "card,demo")] == ["card", "demo"]
    with pytest.raises(ValueError, match="no part's name begins with 'deno'; they are: card; "):
        drill.choose(found, "card,deno")


def test_the_error_of_a_log_is_its_last_exception():
    log = "Traceback\n  File x\nIndexError: index out of range\nvm.py: warning\nEOFError\nnoise"
    assert drill.last_error(log) == "EOFError" and drill.last_error("a\nb\n") == "b"
    assert drill.last_error("torch.OutOfMemoryError: CUDA\nmore") == "torch.OutOfMemoryError: CUDA"
    assert drill.last_error("") == "it printed nothing"


def test_tables_show_speed_against_the_cards_peak_and_what_failed():
    card = {"seconds": 1.0, "machine": "m", "versions": "jax 1", "device_kind": "NVIDIA H100 80GB HBM3"}
    card |= {"matmul_flops": 7e14, "copy_bytes": 3e12, "target_config": ""}
    entries = {"card": card, "step": {"seconds": 2.0, "rows": [ROW]}, "demo": {"seconds": 3.0, "error": "no emoji"}}
    text = drill_table.render({"size": "card", "cards": "NVIDIA H100", "parts": entries})
    cells = next(line for line in text.splitlines() if line.startswith("| reflow step")).split(" | ")
    assert cells[1:9] == [
        "2 s (4/s)",
        "torch.compile",
        "3 s (2.67/s)",
        "1.50",
        "0% / 0%",
        "494.5",
        "50%",
        "1.00 / 1.00",
    ]
    assert "demo: failed after 3 s: no emoji" in text and "700 TFLOP/s in a bf16 product" in text


@pytest.mark.slow
def test_pytorchs_complete_training_steps_run():
    """Of ours, the stages' tests show it."""
    references()
    size = {"configs": DRY.configs, "latent": 8, "batch": 2, "dtype": "float32", "crop": 4, "margin": 1}
    for loss, remat in (("reflow", "none"), ("LPIPS", "blocks")):
        calls = twins.full(loss=loss, remat=remat, device="cpu", compiled=False, **size)
        assert list(calls) == [f"{loss} step, remat {remat}, batch 2"]
        next(iter(calls.values())).run()


@pytest.mark.slow
@pytest.mark.parametrize("network", ["clip", "lpips"])
def test_parity_of_a_network_in_both_precisions(network):
    row = parity.NETWORKS[network](parity.Setting(DRY.configs, DRY.latent, bf16=True))
    assert row["ours"] < parity.LIMIT and row["ours64"] < parity.LIMIT and row["torch64"] < parity.LIMIT
    assert 1e-4 < row["ours_bf16"] < 5e-2 and 1e-4 < row["torch_bf16"] < 5e-2


# ---------------------------------------------------------------- SkyPilot


@pytest.mark.parametrize("name", ["sky.yaml", "sky_tpu.yaml"])
def test_a_sky_task_runs_commands_that_exist(name, monkeypatch):
    task = yaml.safe_load((ROOT / "launch" / name).read_text())
    assert {"name", "workdir", "resources", "envs", "file_mounts", "setup", "run"} == task.keys()
    functions = (ROOT / "launch" / "env.sh").read_text()
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, check=True, text=True).returncode == 0
        assert script.splitlines()[0] == ". launch/env.sh"
    words = shlex.split(task["run"].replace("\\\n", " ").splitlines()[1])
    assert words[0] == "stage" and "stage() {" in functions and "install() {" in functions
    config = parse([*MAIN, *(word for word in words[1:] if word.startswith("--config"))], monkeypatch)
    assert config.stage == "reflow" and config.dtype == "bfloat16" and config.fsdp in (8, 16)
    assert f"AGAIN={task['resources']['job_recovery']['recover_on_exit_codes'][0]} " in functions
    assert {*re.findall(r"\$\{?([A-Z]+)", task["run"] + str(task["file_mounts"]))} == {*task["envs"]}
