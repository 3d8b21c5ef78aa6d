"""Runs and models in buckets: against emulators of Google's and Amazon's stores on this machine, and in memory."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
import toy_training
from helpers import ROOT, free_port, read_config

from instaflow_jax import main
from instaflow_jax.data.pairs.reader import Pairs
from instaflow_jax.infra import buckets, checkpoint, devices, files, stores

pytestmark = pytest.mark.usefixtures("fast_compilation")

# Makes pairs and trains the toy in one workdir.
RUN = """
import sys
import test_stores
test_stores.run(*sys.argv[1:])
"""
UNEQUAL = {"speed.jsonl", "checkpoints", "hparams.json"}  # seconds, and Orbax's own files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no mirror of another test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    stores.set_limit(10**9)


@pytest.fixture
def memory():
    """A store in this process."""
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()


def with_generation(objects):
    """The emulator's `download` with a header that it lacks, without which tensorstore cannot update an object."""
    download = objects.download

    def handle(request, response, storage, *rest, **named):
        names = request.params["bucket_name"], request.params["object_id"]
        with contextlib.suppress(objects.NotFound):
            response["x-goog-generation"] = storage.get_file_obj(*names)["generation"]
        return download(request, response, storage, *rest, **named)

    return handle


def one_at_a_time(handle):
    """The emulator's `handle` with a lock, because its dictionaries do not stand two requests at once."""
    lock = threading.Lock()

    def locked(router, method):
        with lock:
            handle(router, method)

    return locked


@pytest.fixture(scope="module")
def gcs():
    """An emulator of Google's store with the bucket gs://bucket."""
    server = pytest.importorskip("gcp_storage_emulator.server")
    from http.server import ThreadingHTTPServer

    from gcp_storage_emulator.handlers import objects

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadingHTTPServer, "handle_error", lambda *_: None)  # a client that was killed
        patch.setattr(objects, "download", with_generation(objects))
        patch.setattr(server.Router, "handle", one_at_a_time(server.Router.handle))
        port = free_port()
        emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        with pytest.MonkeyPatch.context() as starting:  # connections that stay open need threads
            starting.setattr(server.server, "HTTPServer", ThreadingHTTPServer)
            emulator.start()
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://127.0.0.1:{port}")
        patch.setenv("NO_GCE_CHECK", "true")  # nobody asks for Google's credentials
        patch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield fsspec.filesystem("gs")
        emulator.stop()


@pytest.fixture(scope="module")
def s3():
    """An emulator of Amazon's store with the bucket s3://bucket."""
    server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    emulator = server.ThreadedMotoServer("127.0.0.1", free_port())
    emulator.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*emulator.get_host_and_port()))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        yield store
    emulator.stop()


def pairs_config(teacher, **changed):
    config = read_config("generate")
    config.update({"model": str(teacher), "count": 16, "shard_size": 4, "batch": 4, "N": 2, "preview": 1} | changed)
    return config


def run(teacher, workdir):
    """Pairs, then eight steps of training with a checkpoint after every other one."""
    main.run(pairs_config(teacher), workdir)
    with stores.open_workdir(workdir, write=True) as folder:
        toy_training.run(Path(folder) / "toy", 8)


def products(names):
    return {name: content for name, content in names.items() if not UNEQUAL & {*name.split("/")}}


def files_of(folder: Path) -> dict[str, bytes]:
    return products({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})


def objects_of(store, root: str) -> dict[str, bytes]:
    return products({path.removeprefix(root + "/"): store.cat(path) for path in store.find(root)})


def weights(folder):
    mesh = devices.make_mesh(fsdp=1)
    return toy_training.leaves(checkpoint.load_weights(folder / "checkpoints", "ema", mesh, step=None, like=None))


# ---------------------------------------------------------------- killed and resumed


@pytest.mark.slow
def test_a_killed_run_is_resumed_on_another_machine(gcs, teacher, tmp_path, cache):
    """Killed while checkpoints are written, and resumed with an empty cache: equal to an unbroken run on a disk."""
    with toy_training.compile_once(tmp_path / "compiled"):
        run(teacher, str(tmp_path / "disk"))
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        }
        process = subprocess.Popen([sys.executable, "-c", RUN, str(teacher), "gs://bucket/run"], env=environment)
        while process.poll() is None and not gcs.exists("bucket/run/toy/checkpoints/2/commit_success.txt"):
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        shutil.rmtree(cache)
        gcs.pipe("bucket/run/toy/checkpoints/7/ema/manifest.ocdbt", b"half")  # newer than all that are complete
        run(teacher, "gs://bucket/run")
    assert objects_of(gcs, "bucket/run") == files_of(tmp_path / "disk")
    assert {path.split("/")[4] for path in gcs.find("bucket/run/toy/checkpoints")} == {"6", "8"}
    with stores.open_workdir("gs://bucket/run", write=False) as folder:
        ours, theirs = weights(Path(folder) / "toy"), weights(tmp_path / "disk" / "toy")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.slow
def test_an_export_lands_whole_and_is_sampled_by_its_address(s3, teacher, tmp_path, cache):
    config = read_config("export")
    config.update({"model": str(teacher), "formats": ("diffusers",)})
    main.run(config, "s3://bucket/run")
    shutil.rmtree(cache)
    config = read_config("sample")
    config.update({"model": "s3://bucket/run/export/diffusers", "prompts": "house", "seeds": (0,), "N": 1})
    main.run(config, "s3://bucket/drawn")
    with stores.open_workdir("s3://bucket/run", write=False) as folder:
        assert files.find_damage(stores.local(f"{folder}/export")) is None
    assert "bucket/drawn/sample/grid.png" in s3.find("bucket/drawn")
    for name in ("model_index.json", "checksums.json"):  # as if it was still being uploaded: these come last
        s3.rm(f"bucket/run/export/diffusers/{name}")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        main.run(config, str(tmp_path))


@pytest.mark.slow
def test_a_checkpoint_is_uploaded_whole(s3, tmp_path, cache):
    """Where Orbax cannot write by itself."""
    state = toy_training.new_state(devices.make_mesh(fsdp=1))
    with stores.open_workdir("s3://bucket/toy", write=True) as folder:
        saving = checkpoint.Checkpoints(Path(folder) / "checkpoints", keep_last=2, keep_every=0)
        for step in (1, 2, 3):
            saving.save(step, state, {"step": step}, {"name": "toy"})
        saving.close()
        assert checkpoint.complete_steps(Path(folder) / "checkpoints") == [2, 3]
    assert {path.split("/")[3] for path in s3.find("bucket/toy/checkpoints")} == {"2", "3"}
    shutil.rmtree(cache)
    s3.rm("bucket/toy/checkpoints/3/commit_success.txt")  # as if it was still being uploaded
    with stores.open_workdir("s3://bucket/toy", write=True) as folder:
        saving = checkpoint.Checkpoints(Path(folder) / "checkpoints", keep_last=2, keep_every=0)
        restored, position = saving.restore(devices.abstract(state, devices.make_mesh(fsdp=1)))
        saving.close()
    assert position == {"step": 2}
    assert not s3.find("bucket/toy/checkpoints/3")
    for name, value in toy_training.leaves(state).items():
        np.testing.assert_array_equal(toy_training.leaves(restored)[name], value, err_msg=name)


def test_several_processes_need_a_store_that_orbax_knows(memory, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with stores.open_workdir("memory://b/run", write=True) as folder, pytest.raises(ValueError, match="only in gs://"):
        checkpoint.check_place(Path(folder) / "checkpoints")


# ---------------------------------------------------------------- the mirror


def write(folder, **contents):
    for i, (name, text) in enumerate(contents.items()):
        path = Path(folder) / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        os.utime(path, ns=(i, i))


def test_files_are_uploaded_in_the_order_of_writing(memory, monkeypatch):
    order, upload = [], buckets.Bucket.upload
    monkeypatch.setattr(buckets.Bucket, "upload", lambda b, path, name: (order.append(name), upload(b, path, name))[1])
    with stores.open_workdir("memory://b/run", write=True) as folder:
        write(folder, z_bin="data", export__a_bin="more", m_json="last", export_tmp__b_bin="half", _hidden="half")
        stores.sync()
        assert order == ["z.bin", "export/a.bin", "m.json"]
        stores.sync()
        assert len(order) == 3
        write(folder, m_json="new")
        (Path(folder) / "z.bin").unlink()
    assert objects_of(memory, "/b/run") == {"export/a.bin": b"more", "m.json": b"new"}


def test_the_bucket_is_the_truth(memory, cache):
    """A file that was not uploaded before the kill is gone, one that another machine replaced or deleted too."""
    with stores.open_workdir("memory://b/run", write=True) as folder:
        write(folder, a_txt="1", b_txt="2", c_txt="3")
    write(folder, d_txt="lost with the process")
    memory.pipe("/b/run/a.txt", b"4")
    memory.rm("/b/run/b.txt")
    with stores.open_workdir("memory://b/run", write=True) as again:
        assert again == folder
        assert files_of(Path(again)).items() >= {"a.txt": b"4", "c.txt": b"3"}.items()
        assert not (Path(again) / "b.txt").exists() and not (Path(again) / "d.txt").exists()
    assert objects_of(memory, "/b/run") == {"a.txt": b"4", "c.txt": b"3"}


def test_a_replaced_folder_replaces_its_objects(memory, cache):
    with stores.open_workdir("memory://b/run", write=True) as folder:
        write(folder, export__unet_safetensors="old", export__card_md="old")
    shutil.rmtree(cache)
    with stores.open_workdir("memory://b/run", write=True) as folder:
        target = Path(folder) / "export"
        assert [path.name for path in target.iterdir()] == ["card.md"]  # weights wait until they are read
        stores.replace(target)
        with files.atomic_directory(target) as directory:
            (directory / "card.md").write_text("new")
    assert objects_of(memory, "/b/run") == {"export/card.md": b"new"}


def test_an_object_that_came_short_is_not_read(memory, tmp_path, monkeypatch):
    memory.pipe("/b/model/unet/config.json", b"complete")
    store = type(memory)
    monkeypatch.setattr(store, "get_file", lambda self, name, path, **_: Path(path).write_text("com"))
    with pytest.raises(OSError, match="has 8 bytes, but 3 came"):
        stores.local("memory://b/model")
    assert not list(tmp_path.rglob("config.json"))


def test_two_processes_of_one_machine_have_a_mirror_each(memory):
    with stores.open_workdir("memory://b/run", write=True) as folder:
        program = "import sys; from instaflow_jax.infra import stores; print(stores._claim(sys.argv[1])[0])"
        command = [sys.executable, "-c", program, "memory://b/run"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == folder + "~1"


@pytest.mark.slow
def test_pairs_are_read_through_a_cache_that_is_smaller_than_they_are(memory, teacher, tmp_path, cache):
    main.run(pairs_config(teacher), str(tmp_path))
    shutil.copytree(tmp_path / "pairs", cache / "copy")
    for path in (tmp_path / "pairs").iterdir():
        memory.pipe(f"/b/run/pairs/{path.name}", path.read_bytes())
    shutil.rmtree(cache)
    shards = sorted(name for name in memory.find("/b/run/pairs") if name.endswith("-of-00004"))
    with stores.open_workdir("memory://b/run", write=False) as folder:
        here = Path(folder) / "pairs"
        pairs, expected = Pairs(here), Pairs(tmp_path / "pairs")
        stores.set_limit(stores._usage(stores.cache()) + 2 * max(memory.size(name) for name in shards) + 4096)
        for numbers in ([0, 5], [9, 14], [1, 15]):
            for name, rows in expected.batch(numbers).items():
                np.testing.assert_array_equal(pairs.batch(numbers)[name], rows)
            assert 1 <= len(list(here.glob("*-of-00004"))) <= 2
        stores.set_limit(0)
        with pytest.raises(OSError, match="use a larger --cache_gb"):
            pairs.batch([5])


def test_an_old_mirror_makes_room_and_compiled_programs_stay(memory, cache):
    compiled = cache / "instaflow_jax" / "compiled" / "program"  # `devices.keep_compiled_programs`
    compiled.parent.mkdir(parents=True)
    compiled.write_bytes(b"0" * 100_000)
    memory.pipe({"/b/one/a": b"1" * 100_000, "/b/two/a": b"2" * 100_000})
    with stores.open_workdir("memory://b/one", write=False) as one:
        pass
    stores.set_limit(150_000)
    with stores.open_workdir("memory://b/two", write=False) as two:
        assert (Path(two) / "a").is_file() and not Path(one).exists()
    assert compiled.is_file()


# ---------------------------------------------------------------- refused in one line


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://bucket/run", r"s3://bucket/run needs a package .*use pip install -e '\.\[s3\]'"),
        ("gs://bucket/run", r"gs://bucket/run needs a package .*use pip install -e '\.\[gcs\]'"),
        ("nowhere://run", r"nowhere://run: Protocol not known: nowhere; use gs://"),
    ],
)
def test_a_missing_client_is_named_before_anything_is_computed(address, words, monkeypatch, teacher):
    for package, scheme in (("s3fs", "s3"), ("gcsfs", "gs")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(ValueError, match=words):
        main.run(pairs_config(teacher), address)
    with pytest.raises(ValueError, match=words):
        stores.local(address)


@pytest.mark.slow
def test_an_unreachable_bucket_is_one_line(tmp_path):
    pytest.importorskip("s3fs")
    environment = os.environ | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "AWS_MAX_ATTEMPTS": "1"}
    environment |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    command = ["-m", "instaflow_jax.main", "--config=configs/generate.py", "--workdir=s3://bucket/run"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: cannot list s3://bucket/run: Could not connect")
    assert len(done.stderr.splitlines()) == 1


def test_a_bucket_that_refuses_is_one_line(s3, teacher):
    with pytest.raises(OSError, match=r"cannot (list|write to) s3://absent/run"):
        main.run(pairs_config(teacher), "s3://absent/run")
