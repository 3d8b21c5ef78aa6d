import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from instaflow_jax.evals import frechet
from instaflow_jax.infra import checkpoint, cost, epochs, files, images, messages, metrics
from instaflow_jax.infra.progress import Progress, clock_time
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.weights import hub, port

# ---------------------------------------------------------------- files


def fail_halfway(path):
    with files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_an_atomic_write_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError):
        fail_halfway(path)
    assert path.read_text() == "old"
    with files.atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_names_the_file(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match=rf"cannot write {path}: No space left") as failed, files.atomic_write(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert failed.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"cannot write .*missing/a\.txt"):
        files.write_text(tmp_path / "missing/a.txt", "")


NOISE = np.random.default_rng(0).integers(0, 255, (150, 150, 3)).astype(np.uint8)


def write_weights(path, form):
    layout = hub.Layout(stem="file", flax="file")
    port.save({"a.kernel": np.zeros((100, 100), np.float32)}, path.parent, layout, form=form)


@pytest.mark.parametrize(
    "write, size",
    [
        (lambda path: files.write_text(path, "x" * 50_000), "50.0 kB"),
        (lambda path: files.write_json(path, ["x" * 50_000]), "50.0 kB"),
        (lambda path: images.save_png(path, NOISE, {}), "67.8 kB"),
        (lambda path: metrics.append(path, "x" * 50_000), "50.0 kB"),
        (lambda path: frechet.Moments(2, np.zeros(99), np.zeros((99, 99))).save(path), "80.0 kB"),
        (lambda path: write_weights(path, "safetensors"), "40.0 kB"),
        (lambda path: write_weights(path, "flax"), "40.0 kB"),
        (lambda path: checkpoint.save_weights(path, {"unet": {"a": NOISE.astype(np.float32)}}), "270.0 kB"),
    ],
)
def test_a_full_disk_names_the_file_and_the_bytes_it_takes(write, size, tmp_path):
    """Files are limited to 20 kB, which the system reports like a full disk."""
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError) as failed:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    words = (
        rf"cannot write {path.parent}\S*: File too large; it takes {size} and [\d.]+ .B are free: make room and start"
    )
    assert re.search(words, str(failed.value)) and "\n" not in str(failed.value)


def test_a_long_text_is_quoted_in_part():
    assert messages.quote("a face") == "'a face'"
    assert len(messages.quote("x" * 10_000)) == 82


def test_a_long_list_is_given_in_part():
    assert messages.first_ten(["a", "b"]) == "a, b"
    assert messages.first_ten([*"abcdefghijkl"], "; ") == "a; b; c; d; e; f; g; h; i; j and 2 more"


def test_the_first_write_into_a_directory_deletes_stale_files_and_later_ones_nothing(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    here, container = files._system(), f"{files.socket.gethostname()}-1"
    stale = [tmp_path / f".a.{here}.{pid}" for pid in (ended.pid, os.getpid())]  # our own id may be a used one
    alive = [tmp_path / f".a.{here}.{os.getppid()}", tmp_path / ".a.another-host.1", tmp_path / "a"]
    # A container with this host's name has ids of its own; what it has not written to for a day is left over.
    stale += [tmp_path / f".a.{container}.{os.getppid()}"]
    alive += [tmp_path / f".b.{container}.{os.getppid()}", tmp_path / f".c.{container}.{ended.pid}"]
    alive += [tmp_path / f".a.{files.socket.gethostname()}-backup.1"]  # another program's
    for path in (*stale, *alive):
        path.touch()
    for path in (stale[-1], alive[-1]):
        os.utime(path, (time.time() - 90_000,) * 2)
    own = files.temporary_name(tmp_path / "b")
    own.touch()
    assert sorted(tmp_path.iterdir()) == sorted([*alive, own])
    files.write_text(tmp_path / "c", "")  # while `own` is being written
    assert sorted(tmp_path.iterdir()) == sorted([*alive, own, tmp_path / "c"])


def test_json_round_trips_and_errors_name_the_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": ["é", 1.5]})
    assert files.read_json(path) == {"a": ["é", 1.5]}
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON .*; delete it"):
        files.read_json(path, remedy="delete it")
    with pytest.raises(FileNotFoundError, match=r"b\.json is missing"):
        files.read_json(tmp_path / "b.json")


def test_hashes_depend_on_contents_only(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_of_file(tmp_path / "a").startswith("ba7816bf8f01cfea")
    assert files.sha256_of_json({"a": 1, "b": 2}) == files.sha256_of_json({"b": 2, "a": 1})
    params = {"x": np.ones(2, np.float32), "y": np.zeros((2, 2), np.float32)}
    assert files.sha256_of_params(params) == files.sha256_of_params(dict(reversed(params.items())))
    assert files.sha256_of_params(params) != files.sha256_of_params(params | {"x": np.ones((1, 2), np.float32)})


# ---------------------------------------------------------------- runner


def scaled_rows(fixed, rows, offset):
    return {"y": rows * fixed["scale"] + offset[:, None], "n": rows.sum(1)}


def check_runner(runner, count):
    rows, offset = np.arange(3.0 * count, dtype=np.float32).reshape(count, 3), np.arange(count, dtype=np.float32)
    found = runner(runner.place({"scale": np.float32(2)}), rows, offset)
    np.testing.assert_array_equal(found["y"], rows * 2 + offset[:, None])
    np.testing.assert_array_equal(found["n"], rows.sum(1))


@pytest.mark.parametrize("count", [1, 4, 7])
def test_runner_returns_as_many_rows_as_it_gets(count):
    runner = BatchedRunner(scaled_rows, per_device=4)
    assert runner.rows == 4 * len(jax.local_devices())
    check_runner(runner, count)


def test_runner_compiles_once():
    traced = []

    def function(fixed, rows):
        traced.append(rows.shape)
        return rows + fixed

    runner = BatchedRunner(function, per_device=2)
    assert runner.compile(np.float32(1), jax.ShapeDtypeStruct((runner.rows, 3), jnp.float32)) > 0
    runner(np.float32(1), np.ones((5, 3), np.float32))
    assert traced == [(2, 3)]


def test_runner_starts_without_waiting_and_fills_missing_rows():
    runner = BatchedRunner(lambda fixed, rows: rows + fixed, per_device=4)
    started = [runner.start(np.float32(n), np.arange(3, dtype=np.float32)) for n in range(3)]
    assert all(isinstance(result, jax.Array) and result.shape == (runner.rows,) for result in started)
    for n, result in enumerate(started):
        np.testing.assert_array_equal(result[:3], np.arange(3) + n)


@pytest.mark.slow
def test_runner_uses_every_device():
    code = (
        "import jax, numpy as np, test_infra as t; runner = t.BatchedRunner(t.scaled_rows, per_device=2); "
        "assert runner.rows == 8; [t.check_runner(runner, count) for count in (1, 8, 11)]"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    flags["PYTHONPATH"] = ":".join([os.path.dirname(__file__), *sys.path])
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | flags).returncode == 0


# ---------------------------------------------------------------- epochs


def test_epochs_keep_the_order_of_version_0_1():
    found = epochs.ShuffledEpochs(7, batch_size=3, seed=5)
    for epoch in range(2):
        order = np.random.default_rng([5, epoch]).permutation(7)
        np.testing.assert_array_equal(found[2 * epoch], order[:3])
        np.testing.assert_array_equal(found[2 * epoch + 1], order[3:6])
    np.testing.assert_array_equal(found[0], np.random.default_rng([5, 0]).permutation(7)[:3])  # steps in any order


def test_processes_share_a_batch(monkeypatch):
    full = epochs.ShuffledEpochs(16, batch_size=8, seed=0)[3]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(epochs.ShuffledEpochs(16, batch_size=8, seed=0)[3])
    np.testing.assert_array_equal(np.concatenate(shares), full)
    with pytest.raises(ValueError, match="batch_size=5 must be a multiple of 2, the number of processes"):
        epochs.ShuffledEpochs(16, batch_size=5, seed=0)


# ---------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """tqdm's time, which a test advances by hand."""
    made = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr("tqdm.std.time", lambda: made.now)
    return made


def test_progress_writes_a_line_to_a_file_every_half_minute(clock):
    file = io.StringIO()
    progress = Progress(1000, "steps", done=200, file=file)
    shown = []
    for _ in range(800):
        clock.now += 0.5
        shown.append(progress.advance(loss=0.25))
    progress.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == sum(shown) == 1 + 800 * 0.5 // 30  # and the last step
    assert lines[0] == "260/1000 steps (26 %) ·  2.00 steps/s · 00:30 elapsed, 06:10 left, loss=0.25"
    assert lines[-1].startswith("1000/1000 steps (100 %) ·  2.00 steps/s · 06:40 elapsed, 00:00 left")


def test_progress_rewrites_one_line_on_a_terminal(clock):
    file = Terminal()
    progress = Progress(4, "pairs", title="toy", file=file)
    for _ in range(4):
        clock.now += 1.0
        assert progress.advance()
    progress.close()
    assert file.getvalue().count("\n") == 1
    assert "\rtoy: 4/4 pairs (100 %) ·  1.00 pairs/s" in file.getvalue()


def test_the_last_unit_is_always_shown(clock):
    file = io.StringIO()
    progress = Progress(10, "images", file=file)
    assert not progress.advance(9)
    assert progress.advance(1)
    assert file.getvalue().startswith("10/10 images (100 %)")


def test_only_the_first_process_shows_progress(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    file = io.StringIO()
    progress = Progress(1, "images", file=file)
    assert not progress.advance(1)
    progress.close()
    assert file.getvalue() == ""


def test_clock_time():
    assert [clock_time(seconds) for seconds in (5.4, 65, 3723)] == ["00:05", "01:05", "1:02:03"]


# ---------------------------------------------------------------- cost


def test_rates_give_mfu_where_the_peak_is_known(monkeypatch):
    monkeypatch.setattr(cost, "peak", lambda kind: cost.Peak(100e12, 1e12, 80e9))
    found = cost.rates(10, 5.0, samples_per_step=32, flops_per_step=20e12)
    assert found == pytest.approx({"steps_per_s": 2, "samples_per_s": 64, "tflop_per_s": 40, "mfu": 0.4})


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks_of_known_devices(kind, flops):
    found = cost.peak(kind)
    assert (found and found.flops) == flops


def test_every_kind_of_equation_is_counted():
    a, b = jnp.ones((4, 16, 64)), jnp.ones((64, 32))
    one = 2 * 16 * 64 * 32

    def looped(a, b):
        return jax.lax.scan(lambda total, rows: (total + rows @ b, None), jnp.zeros((16, 32)), a)[0]

    def by_platform(a, b):
        three_times = lambda x, y: x @ y + x @ y + x @ y  # noqa: E731
        return jax.lax.platform_dependent(a, b, cpu=three_times, default=jnp.matmul)

    def either(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((16, 32)))

    count = lambda f, *x: cost.count_flops(jax.make_jaxpr(f)(*x))  # noqa: E731
    assert count(looped, a, b) == 4 * one
    assert count(by_platform, a[0], b) == count(either, a[0], b) == count(jax.jit(jnp.matmul), a[0], b) == one
    assert not cost.recomputes(jax.make_jaxpr(looped)(a, b))
    again = jax.grad(lambda a, b: jnp.sum(jax.checkpoint(lambda a, b: jnp.sin(jnp.sin(a @ b)))(a, b)), (0, 1))
    assert count(again, a[0], b) == 4 * one and cost.recomputes(jax.make_jaxpr(again)(a[0], b))


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4)])
def test_flops_of_convolutions_and_their_gradients_are_xlas(stride, dilation, groups):
    """On a large image, because XLA leaves products with padded zeros out."""

    def convolve(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        options = {"rhs_dilation": (dilation,) * 2, "dimension_numbers": dims, "feature_group_count": groups}
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, "VALID", **options)

    inputs = jnp.ones((2, 97, 97, 8)), jnp.ones((3, 3, 8 // groups, 12))
    for function in (convolve, jax.value_and_grad(lambda *x: jnp.sum(convolve(*x) ** 2), (0, 1))):
        ours = cost.count_flops(jax.make_jaxpr(function)(*inputs))
        theirs = jax.jit(function).lower(*inputs).cost_analysis()["flops"]
        assert ours == pytest.approx(theirs, rel=0.05)


def test_compiled_step_is_described():
    lowered = jax.jit(lambda a: a @ a).lower(jnp.ones((256, 256)))
    line = cost.describe(lowered.compile(), flops=2e12, seconds=1.5)
    assert line.startswith("step compiled in 1.5 s: 2 TFLOP per step; MiB per device: arguments 0.2")


# ---------------------------------------------------------------- metrics


def test_metrics_are_strict_json_lines(tmp_path):
    writer = metrics.make_writer(tmp_path, tensorboard=False)
    writer.write_scalars(1, {"loss": np.float32(0.1), "size": float("nan")})
    writer.write_scalars(2, {"loss": float("inf")})
    writer.close()
    rows = metrics.read_json_lines(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 1, "loss": float(np.float32(0.1)), "size": None}, {"step": 2, "loss": None}]


def test_resuming_deletes_later_and_incomplete_rows(tmp_path):
    writer = metrics.make_writer(tmp_path, tensorboard=False)
    writer.start(0)  # there is no file yet
    for step in range(1, 5):
        writer.write_scalars(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in metrics.read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    writer.start(2)
    writer.write_scalars(3, {"loss": 30.0})
    assert [row["loss"] for row in metrics.read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 30]


@pytest.mark.slow
def test_tensorboard_gets_the_same_scalars(tmp_path):
    pytest.importorskip("tensorflow")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = metrics.make_writer(tmp_path, tensorboard=True)
    writer.start(0)
    writer.write_hparams({"optim": {"peak": 1e-3}})
    writer.write_scalars(1, {"loss": 0.5})
    writer.write_speed(1, {"steps_per_s": 2.0})
    writer.write_images(1, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert {"loss", "speed/steps_per_s", "samples"} <= set(events.Tags()["tensors"])


@pytest.mark.slow
def test_a_failed_write_for_tensorboard_is_one_error(tmp_path):
    pytest.importorskip("tensorflow")
    (tmp_path / "tensorboard").touch()  # where its folder should be
    writer = metrics.make_writer(tmp_path, tensorboard=True)
    writer.write_scalars(1, {"loss": 0.5})
    with pytest.raises(OSError, match=r"cannot write TensorBoard's files in .*/tensorboard .*Not a directory"):
        writer.close()
    assert metrics.read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_hyper_parameters_are_flat(tmp_path):
    writer = metrics.make_writer(tmp_path, tensorboard=False)
    writer.write_hparams({"optim": {"peak": 1e-3, "betas": (0.9, 0.99)}, "name": "toy"})
    assert json.loads((tmp_path / "hparams.json").read_text()) == {
        "optim.peak": 1e-3,
        "optim.betas": "(0.9, 0.99)",
        "name": "toy",
    }


@pytest.mark.slow
def test_the_loop_imports_no_tensorflow():
    code = (
        "import sys, instaflow_jax.train.loop; sys.exit(any(m in sys.modules for m in ('tensorflow', 'torch', 'clu')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- images


def test_pixels_become_clipped_bytes():
    values = np.array([-2, -1, -1 + 0.9 / 255, -1 + 1.1 / 255, 0.999, 1, 3], np.float32)
    pixels = np.broadcast_to(values[:, None, None], (7, 1, 3))
    np.testing.assert_array_equal(images.to_uint8(pixels)[:, 0, 0], [0, 0, 0, 1, 255, 255, 255])


def test_pixels_survive_the_round_trip_as_bytes():
    values = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    np.testing.assert_array_equal(images.to_uint8(images.to_pixels(values)), values)


def test_grid_lays_out_row_by_row():
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    made = images.grid(pixels, columns=3, row_labels=(), column_labels=(), scale=2)
    assert made.shape == (2 * 8 + images.GAP, 3 * 12 + 2 * images.GAP, 3)
    for number in range(5):
        row, column = divmod(number, 3)
        y, x = row * (8 + images.GAP), column * (12 + images.GAP)
        assert (made[y : y + 8, x : x + 12] == number).all()
    assert (made[8 + images.GAP :, 2 * (12 + images.GAP) :] == images.WHITE).all()


def test_grid_labels_do_not_cover_the_images():
    pixels = np.zeros((2, 20, 30, 3), np.uint8)
    made = images.grid(pixels, columns=1, row_labels=("one", "a longer one"), column_labels=("x",), scale=1)
    black = (made == 0).all(-1)
    assert black[images.LABEL_HEIGHT : images.LABEL_HEIGHT + 20, -30:].all()
    assert black[-20:, -30:].all()
    assert (made[:, :-30] < 128).any()  # text in the margin
    assert (made[: images.LABEL_HEIGHT, -30:] < 128).any()  # and above


def test_a_label_wider_than_its_column_takes_more_lines():
    pixels = np.zeros((2, 20, 60, 3), np.uint8)
    made = images.grid(pixels, columns=2, row_labels=(), column_labels=("short", "wider than sixty pixels"), scale=1)
    top = made.shape[0] - 20
    assert top == 3 * images.LABEL_HEIGHT
    ink = (made[:top, -60:] < 128).any(axis=(1, 2))
    assert all(ink[start : start + images.LABEL_HEIGHT].any() for start in range(0, top, images.LABEL_HEIGHT))


def test_grid_refuses_wrong_labels_and_no_images():
    with pytest.raises(ValueError, match="row_labels has 1 labels for a grid of 2"):
        images.grid(np.zeros((2, 4, 4, 3), np.uint8), columns=1, row_labels=("a",), column_labels=(), scale=1)
    with pytest.raises(ValueError, match="at least one image"):
        images.grid(np.zeros((0, 4, 4, 3), np.uint8), columns=1, row_labels=(), column_labels=(), scale=1)


def test_png_keeps_pixels_and_text(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / "samples" / "1.png"
    images.save_png(path, image, {"prompt": "café 🍎", "seed": "3"})
    pixels, text = images.load_png(path)
    np.testing.assert_array_equal(pixels, image)
    assert text == {"prompt": "café 🍎", "seed": "3"}
    assert list(path.parent.iterdir()) == [path]


def test_a_png_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "1.png"
    images.save_png(path, np.zeros((2, 2, 3), np.uint8), {})

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        images.save_png(path, np.ones((2, 2, 3), np.uint8), {})
    assert (images.load_png(path)[0] == 0).all()
