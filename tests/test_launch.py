"""The command line, and the scripts that a fresh machine starts with."""

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from instaflow_jax import main

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*(p for p in (ROOT / "launch").iterdir() if p.suffix != ".yaml"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(script, os.X_OK) or script.name == "env.sh"


def test_ci_runs_what_the_readme_says():
    readme = (ROOT / "README.md").read_text()
    assert "launch/test.sh" in readme and "launch/demo.sh" in readme
    assert "launch/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_demo_works_from_another_folder_and_passes_arguments_on(tmp_path):
    """With an existing environment (this one), so that nothing is downloaded."""
    program = f"""
    python() {{ echo "ran in $PWD: $*"; }}
    . {ROOT}/launch/env.sh
    install() {{ echo "installs $1"; }}
    """
    script = (ROOT / "launch" / "demo.sh").read_text().replace("exec python", "python")
    script = script.replace('. "$(dirname "${BASH_SOURCE[0]}")/env.sh"', program)
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text("")
    (venv / "python").write_text("")
    (venv / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script, "demo", "--workdir=elsewhere"],
        check=False,
        cwd=tmp_path,
        env=os.environ | {"VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    command = "-m instaflow_jax.main --config=configs/demo.py --workdir=runs/demo --cpu_devices=2 --workdir=elsewhere"
    assert done.stdout.splitlines() == [
        "installs demo",
        f"ran in {ROOT}: {command}",
    ]


@pytest.mark.slow
def test_the_cpu_is_split_into_the_devices_of_the_flag():
    program = """
import sys
import jax
from absl import flags
from instaflow_jax import main
sys.argv = ["main", "--config=configs/sample.py", "--config.stage=nothing", "--cpu_devices=3"]
flags.FLAGS(sys.argv)
try:
    main.main(["main"])
except SystemExit as end:
    print(end.code, jax.device_count())
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("error: config.stage='nothing' is not one of"), done.stderr
    assert done.stdout.endswith(" 3\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--config=configs/sample.py --config.promts=x", "the config has no field 'promts'; did you mean 'prompts'?"),
        ("--config=configs/sample.py --config.delta.scal=1", "no field 'delta.scal'; did you mean 'delta.scale'?"),
        ("--config=configs/sample.py:sd51", "no variant 'sd51'; it has openmoji, sd15"),
        ("--config=configs/demo.py:sd15", "no variant 'sd15'; it has openmoji, full"),
        ("--config configs/smple.py", "configs/smple.py: no such file; did you mean 'configs/sample.py'?"),
        ("--workdir=x", "no config is given; use --config=configs/STAGE.py"),
        (
            "--config=configs/sample.py --config.kind=flow",
            "config.kind was renamed in version 0.2; use --config.dynamics",
        ),
        ("--config=configs/serve.py --config.teacher_kind=flow", "use --config.teacher_dynamics"),
        ("--config=configs/serve.py --config.steps=1", "use --config.N"),
        ("--config=configs/serve.py --config.max_pictures=1", "use --config.max_images"),
        ("--config=configs/reflow.py --config.schedule.kind=x", "use --config.schedule.name"),
        ("--config=configs/reflow.py --config.watch_every=1", "use --config.eval_every"),
        ("--config=configs/reflow.py --config.watch.steps=1", "use --config.eval.N"),
        ("--config=configs/reflow.py --config.drop=0", "use --config.prompt_dropout"),
        ("--config=configs/reflow.py --config.pairs.kind=flow", "use --config.pairs.dynamics"),
        ("--config=configs/demo.py --config.reflow.watch.seeds=1", "use --config.reflow.eval.seeds"),
        ("--config=configs/distill.py --config.start=x", "use --config.init_from"),
        ("--config=configs/distill.py --config.pairs_in=x", "use --config.pairs_folder"),
        ("--config=configs/export.py --config.into=x", "use --config.output"),
        ("--config=configs/evaluate.py --config.also=x", "use --config.extra"),
        ("--config=configs/evaluate.py --config.teacher.steps=1", "use --config.teacher.N"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_line(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["main", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        main.parse_flags(sys.argv)
    assert str(end.value.code).startswith("error: ") and words in end.value.code and "\n" not in end.value.code


def test_a_variant_of_a_config_without_variants_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n"
    )
    assert not main.load_config(str(tmp_path / "own.py"))
    with pytest.raises(ValueError, match=r"own\.py has no variants; use --config=.*own\.py$"):
        main.load_config(f"{tmp_path}/own.py:sd15")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--config.N=abc", "invalid literal for int() with base 10: 'abc'; use a value like the default, 25"),
        ("--config.seeds=1,a", "wrong type; use a value like the default, (0, 1, 2, 3)"),
        ("--confg=x", "Unknown command line flag 'confg'. Did you mean: config"),
        ("stray", "unexpected arguments ['stray']"),
    ],
)
def test_a_wrong_value_ends_in_one_line_and_exit_code_1(argument, line):
    command = [sys.executable, "-m", "instaflow_jax.main", "--config=configs/sample.py", argument]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and line in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "clu"])
def test_a_missing_optional_package_ends_in_one_line_that_names_its_extra(package, monkeypatch):
    stage = types.SimpleNamespace(run=lambda config, workdir: importlib.import_module(f"{package}.x"))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "instaflow_jax.stages.sample", stage)
    with pytest.raises(ValueError, match=rf"'sample' needs the package '{package}'.* use pip install -e '\.\[train\]'"):
        main.run(ConfigDict({"stage": "sample"}), "nowhere")


@pytest.mark.parametrize(
    ("given", "exported"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_scripts_use_huge_pages_unless_the_environment_says_otherwise(place, given, exported):
    env = {name: value for name, value in environment(place).items() if name != "GLIBC_TUNABLES"}
    env |= {} if given is None else {"GLIBC_TUNABLES": given}
    command = ["bash", "-c", f'. {ROOT}/launch/env.sh; echo "$GLIBC_TUNABLES"']
    assert subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout == f"{exported}\n"


@pytest.mark.parametrize(
    ("given", "exported"),
    [
        ({}, "0.9,"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, "0.5,"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}, ",0.6"),
    ],
)
def test_jax_may_take_most_of_a_gpus_memory_unless_the_environment_says_otherwise(place, given, exported):
    """Under one name only: jax refuses both."""
    env = {name: value for name, value in environment(place).items() if not name.endswith("CLIENT_MEM_FRACTION")}
    show = 'echo "${XLA_CLIENT_MEM_FRACTION:-},${XLA_PYTHON_CLIENT_MEM_FRACTION:-}"'
    command = ["bash", "-c", f". {ROOT}/launch/env.sh; {show}"]
    assert (
        subprocess.run(command, env=env | given, check=True, capture_output=True, text=True).stdout == f"{exported}\n"
    )


@pytest.fixture
def place(tmp_path):
    """An existing environment, and a folder of stubs that comes first on PATH."""
    (tmp_path / "stubs").mkdir()
    (tmp_path / "log").write_text("")
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f"export PATH={binaries}:$PATH\n")
    write_stub(binaries / "python", 'echo "python $*" >> "$LOG"')
    digest = hashlib.sha256((ROOT / "setup.py").read_bytes()).hexdigest()[:16]
    for extra in ("gpu,train", "tpu,train,gcs"):
        (tmp_path / "venv" / f"installed-{extra}-{digest}").touch()
    return tmp_path


def write_stub(path, body):
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def environment(place, **more):
    """The variables of a script; PATH finds the stubs of gcloud, srun, ... first."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TPU_"))}
    return (
        inherited
        | {"PATH": f"{place}/stubs:{os.environ['PATH']}", "VENV": f"{place}/venv", "LOG": f"{place}/log"}
        | more
    )


def launch(place, script, *arguments, cwd=ROOT, **more):
    """A script run to its end; its exit code and the commands it ran."""
    done = subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=environment(place, **more),
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done, (place / "log").read_text().splitlines()


def test_scripts_for_clusters_are_short():
    for name in ("one_node.sh", "slurm.sbatch", "tpu_pod.sh"):
        assert len((ROOT / "launch" / name).read_text().splitlines()) < 40, name


def test_the_compile_cache_is_on_and_may_be_moved(place):
    show = f'. {ROOT}/launch/env.sh; echo "$PWD $JAX_COMPILATION_CACHE_DIR"'
    for more, cache in (({}, f"{place}/venv/compiled"), ({"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, "/elsewhere")):
        env = environment(place)
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        said = subprocess.run(
            ["bash", "-c", show], cwd=place, env=env | more, check=True, capture_output=True, text=True
        )
        assert said.stdout.split() == [str(ROOT), cache]


def test_one_node_runs_the_stage_from_any_folder(place):
    done, log = launch(
        place, ROOT / "launch" / "one_node.sh", "--config=configs/reflow.py", "--config.eval.prompts=a b", cwd=place
    )
    assert done.returncode == 0, done.stderr
    assert log == ["python -m instaflow_jax.main --config=configs/reflow.py --config.eval.prompts=a b"]


@pytest.mark.parametrize(
    ("python", "code"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ("kill -TERM $PPID; exit 0", 75),  # it saved
        ("kill -TERM $PPID; kill -TERM $$", 75),  # it has nothing to save
        ("kill -TERM $PPID; exit 1", 1),  # it could not save
        ("kill -KILL $$", 137),
    ],
)
def test_a_stage_that_sigterm_stopped_exits_with_the_code_for_another_start(place, python, code):
    write_stub(place / "venv" / "bin" / "python", python)
    done = subprocess.run(
        ["bash", "-c", f". {ROOT}/launch/env.sh; stage --config=x"], env=environment(place), check=False
    )
    assert done.returncode == code


# ---------------------------------------------------------------- TPU

POD = {"TPU_NAME": "flow", "TPU_ZONE": "us-east5-a", "TPU_TYPE": "v5p-32", "TPU_IMAGE": "v2-alpha-tpuv5"}
# A TPU that is not there at first; the first run on it ends as {ends} says, the others succeed.
GCLOUD = """
shift 3
echo "gcloud $*" >> "$LOG"
case $1 in
  list) cat {place}/state 2>/dev/null ;;
  create) echo READY > {place}/state ;;
  delete) rm {place}/state ;;
  scp) tar -xzf "$2" -C {place}/home ;;
  ssh) [ -e {place}/tried ] && exit 0; touch {place}/tried; {ends} ;;
esac
exit 0
"""


def pod(place, ends, *arguments, **more):
    (place / "home").mkdir()
    write_stub(place / "stubs" / "gcloud", GCLOUD.format(place=place, ends=ends))
    write_stub(place / "stubs" / "sleep", 'echo "sleep $*" >> "$LOG"')
    done, log = launch(place, ROOT / "launch" / "tpu_pod.sh", *arguments, **POD | more)
    return done, [re.sub(r"/\S+\.tgz", "CODE", line) for line in log]


REMOTE = (
    "--worker=all --command={setup} && mkdir -p instaflow_jax && tar -xzf instaflow_jax.tgz -C instaflow_jax && "
    "cd instaflow_jax && bash -c '. launch/env.sh; install tpu,train,gcs; stage \"$@\"' stage --processes=0 "
    "{arguments} --zone=us-east5-a"
)
LIST = "gcloud list --filter=name~/nodes/flow$ --format=value(state) --zone=us-east5-a"
CREATE = "gcloud create flow --accelerator-type=v5p-32 --version=v2-alpha-tpuv5 --spot --zone=us-east5-a"
SCP = "gcloud scp CODE flow: --worker=all --zone=us-east5-a"


def test_a_preempted_pod_is_created_again(place):
    done, log = pod(
        place,
        f"echo PREEMPTED > {place}/state; exit 255",
        "--config=configs/reflow.py",
        "--workdir=/mnt/a b",
        TPU_SETUP="sudo mount /mnt",
    )
    assert done.returncode == 0, done.stderr
    ssh = "gcloud ssh flow " + REMOTE.format(
        setup="sudo mount /mnt", arguments=r"--config=configs/reflow.py --workdir=/mnt/a\ b"
    )
    assert log == [
        LIST,
        CREATE,
        LIST,
        SCP,
        ssh,
        LIST,
        "sleep 30",
        LIST,
        "gcloud delete flow --quiet --zone=us-east5-a",
        LIST,
        CREATE,
        LIST,
        SCP,
        ssh,
        LIST,
    ]


def test_what_a_pod_runs_is_the_stage_with_its_arguments(place):
    """The command that workers get, run here by their shell in the folder that the code was copied to."""
    _, log = pod(place, "exit 0", "--config=configs/reflow.py", "--config.eval.prompts=('a cat',)")
    assert {path.name for path in (place / "home").iterdir()} == {
        "setup.py",
        "README.md",
        "LICENSE",
        "configs",
        "instaflow_jax",
        "launch",
    }
    for path in (place / "home").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = next(line for line in log if line.startswith("gcloud ssh")).partition("--command=")[2]
    command = command.replace(
        "&& tar -xzf instaflow_jax.tgz -C instaflow_jax", f"&& cp -r {ROOT}/launch {ROOT}/setup.py instaflow_jax"
    )
    (place / "log").write_text("")
    subprocess.run(
        ["bash", "-c", command.removesuffix(" --zone=us-east5-a")],
        cwd=place / "home",
        check=True,
        env=environment(place),
    )
    assert (place / "log").read_text() == (
        "python -m instaflow_jax.main --processes=0 --config=configs/reflow.py --config.eval.prompts=('a cat',)\n"
    )


def test_a_pod_that_fails_ends_with_its_code(place):
    done, log = pod(place, "exit 3", "--config=configs/reflow.py")
    assert done.returncode == 3
    assert "gcloud delete" not in "\n".join(log)


def test_a_pod_is_not_made_when_gcloud_does_not_answer(place):
    write_stub(place / "stubs" / "gcloud", 'echo "gcloud $4" >> "$LOG"; exit 1')
    done, log = launch(place, ROOT / "launch" / "tpu_pod.sh", **POD)
    assert done.returncode == 1
    assert log == ["gcloud list"]


# ---------------------------------------------------------------- Slurm

# Two tasks of one node, each the leader of a process group that scancel signals. Exits with their highest code.
SRUN = """
echo "srun $*" >> "$LOG"
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
  SLURM_NTASKS=2 SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NODELIST=localhost setsid "$@" &
  tasks[task]=$!
done
echo "${tasks[@]}" > "$LOG.tasks"
worst=0
for task in "${tasks[@]}"; do
  code=0; wait "$task" || code=$?
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""
SCANCEL = 'echo "scancel $*" >> "$LOG"; for task in $(cat "$LOG.tasks"); do kill -TERM -- "-$task"; done'


@contextlib.contextmanager
def slurm(place, *arguments, job, **more):
    """The batch script as Slurm runs it: a copy, from the folder it was submitted in; none of it outlives the block."""
    for name, body in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", 'echo "scontrol $*" >> "$LOG"')):
        write_stub(place / "stubs" / name, body)
    copy = shutil.copy(ROOT / "launch" / "slurm.sbatch", place / "slurm_script")
    env = environment(place, SLURM_JOB_ID=str(job), SLURM_SUBMIT_DIR=str(ROOT), SLURM_CPUS_PER_TASK="8", **more)
    shell = subprocess.Popen(
        ["bash", copy, *arguments], cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield shell
    finally:
        shell.kill()
        tasks = place / "log.tasks"
        for group in map(int, tasks.read_text().split() if tasks.is_file() else ()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def end(shell):
    """Its exit code and output."""
    said, _ = shell.communicate(timeout=240)
    return shell.returncode, said


def started(arguments):
    return (
        'srun --kill-on-bad-exit=0 --cpus-per-task=8 bash -c . launch/env.sh; stage "$@" stage --processes=0 '
        + " ".join(arguments)
    )


@pytest.mark.parametrize(
    ("python", "code", "requeued"),
    [
        ("exit 0", 0, []),
        ("exit 1", 1, []),
        ("kill -TERM $PPID; exit 0", 0, ["scontrol requeue 4711"]),
    ],
)
def test_a_slurm_job_is_queued_again_only_after_sigterm(place, python, code, requeued):
    write_stub(place / "venv" / "bin" / "python", python)
    with slurm(place, "--config=configs/reflow.py", job=4711) as job:
        assert end(job)[0] == code
    assert (place / "log").read_text().splitlines() == [started(["--config=configs/reflow.py"]), *requeued]


@pytest.mark.slow
def test_a_slurm_job_of_two_processes_saves_at_its_time_limit_and_resumes(place, teacher):
    """Trains reflow, with its pairs made first; the batch shell gets Slurm's signal before the time limit."""
    write_stub(place / "venv" / "bin" / "python", f'[ "$2" != pip ] && exec {sys.executable} "$@"')  # installs nothing
    workdir, env = (
        place / "run",
        {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
    )
    metrics = workdir / "reflow" / "metrics.jsonl"
    with slurm(place, *tiny_reflow(teacher, workdir, steps=10**6), job=free_job(), **env) as first:
        wait_for(lambda: metrics.is_file() and '"loss"' in metrics.read_text(), first)
        first.send_signal(signal.SIGTERM)
        code, said = end(first)
    assert code == 0, said
    assert [line.split()[0] for line in (place / "log").read_text().splitlines()] == ["srun", "scancel", "scontrol"], (
        said
    )

    saved = steps(metrics)
    with slurm(
        place, *tiny_reflow(teacher, workdir, steps=saved[-1] + 2), "--config.resume=force", job=free_job(), **env
    ) as second:
        code, said = end(second)
    assert code == 0, said
    assert steps(metrics) == list(range(1, saved[-1] + 3))
    assert f"resumed from step {saved[-1]}" in said
    assert (workdir / "reflow" / "export" / "model_index.json").is_file()


def tiny_reflow(teacher, workdir, *, steps):
    fields = {
        "model": teacher,
        "batch_size": 4,
        "eval_every": 10**6,
        "tensorboard": False,
        "loop.steps": steps,
        "loop.log_every": 1,
        "loop.save_every": 10**6,
        "eval.prompts": "('red apple',)",
        "eval.seeds": 1,
        "eval.N": "(1,)",
        "schedule.warmup_steps": 1,
        "pairs.model": teacher,
        "pairs.count": 8,
        "pairs.shard_size": 4,
        "pairs.batch": 4,
        "pairs.N": 2,
        "pairs.preview": 1,
    }
    return [
        "--config=configs/reflow.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def steps(metrics):
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


def free_job():
    """A job number whose port, as JAX derives it, is free."""
    for job in itertools.count(1000 + os.getpid()):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", job % 2**12 + 65535 - 2**12 + 1)):
                return job


def wait_for(happened, process):
    for _ in range(2400):
        if happened():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    raise AssertionError("nothing happened in four minutes")


# ---------------------------------------------------------------- Docker


def test_the_docker_image_copies_existing_files():
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if line and line[0] != "#"]
    instructions = {words[0] for words in lines}
    assert lines[0][0] == "FROM" and instructions <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "ENTRYPOINT"}
    for words in lines:
        if words[0] == "COPY":
            assert all((ROOT / name).exists() for name in words[1:-1]), words
    extras = re.search(r"-e \.\[(.*?)\]", (ROOT / "Dockerfile").read_text())[1].split(",")
    assert all(f'"{extra}": ' in (ROOT / "setup.py").read_text() for extra in extras)
    assert json.loads(" ".join(lines[-1][1:])) == ["python", "-m", "instaflow_jax.main"]
