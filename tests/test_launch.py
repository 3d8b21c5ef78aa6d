"""The scripts a fresh machine starts with."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"])


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
    """With an environment that is there already (this one), so that nothing is downloaded."""
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
    done = subprocess.run(["bash", "-c", script, "demo", "--config.N=1"], check=False, cwd=tmp_path,
                          env=os.environ | {"VENV": str(tmp_path / "venv")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "installs demo", f"ran in {ROOT}: -m instaflow_jax.main --config=configs/sample.py --config.N=1"]


def test_the_cpu_is_split_into_the_devices_asked_for():
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
