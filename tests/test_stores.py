"""Runs and models in buckets: against emulators of Google's and Amazon's stores on this machine, and in memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax
import pytest
import toy_training
from helpers import ROOT, free_port, read_config, reflow_config

from instaflow_jax import main

RUN = """
import sys
import helpers
from instaflow_jax import main
main.run(helpers.reflow_config(sys.argv[1]), sys.argv[2])
"""
# What holds seconds, and Orbax's own files.
UNEQUAL = ("speed.jsonl", "checkpoints")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gcs():
    """An emulator of Google's store with the bucket gs://bucket, on this machine."""
    server = pytest.importorskip("gcp_storage_emulator.server")
    from http.server import ThreadingHTTPServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.server, "HTTPServer", ThreadingHTTPServer)
        emulator = server.create_server("localhost", free_port(), in_memory=True, default_bucket="bucket")
        emulator.start()
        host, port = emulator._api._httpd.server_address[:2]
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://{host}:{port}")
        yield fsspec.filesystem("gs")
        emulator.stop()


def files_of(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not {*UNEQUAL} & {*name.split("/")}}


def objects_of(store, root: str) -> dict[str, bytes]:
    found = {path.removeprefix(root + "/"): store.cat(path) for path in store.find(root)}
    return {name: content for name, content in found.items() if not {*UNEQUAL} & {*name.split("/")}}


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_resumed_on_another_machine(gcs, teacher, tmp_path, cache, monkeypatch):
    """With another machine's empty cache; all that the bucket holds at the end equals an unbroken run on a disk."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    jax.config.update("jax_disable_most_optimizations", True)
    with toy_training.compile_once(tmp_path / "compiled"):
        t = time.time()
        main.run(reflow_config(teacher), str(tmp_path / "disk"))
        print("LOCAL", time.time() - t)
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        }
        t = time.time()
        command = [sys.executable, "-c", RUN, str(teacher), "gs://bucket/run"]
        process = subprocess.Popen(command, env=environment, cwd=ROOT)
        while process.poll() is None and not gcs.exists("bucket/run/reflow/checkpoints/2/commit_success.txt"):
            time.sleep(0.05)
        process.kill()
        print("KILLED", time.time() - t)
        assert process.wait() == -signal.SIGKILL
        shutil.rmtree(cache)
        gcs.pipe("bucket/run/reflow/checkpoints/3/params/manifest.ocdbt", b"half")
        t = time.time()
        main.run(reflow_config(teacher), "gs://bucket/run")
        print("RESUMED", time.time() - t)
    jax.config.update("jax_disable_most_optimizations", False)
    assert objects_of(gcs, "bucket/run") == files_of(tmp_path / "disk")
    steps = {path.split("/")[4] for path in gcs.find("bucket/run/reflow/checkpoints")}
    assert steps == {"2", "4"}
