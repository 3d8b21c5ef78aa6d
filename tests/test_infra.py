import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from instaflow_jax.infra import cost, huge_pages, images, metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands in for the time module."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(speed, "time", made)
    return made


def progress(file, steps=1000, start=0):
    return speed.Progress(start=start, steps=steps, samples_per_step=64, flops_per_step=3e12, file=file)


def test_progress_tells_a_file_one_line_now_and_then(clock):
    file = io.StringIO()
    bar = progress(file, start=200)
    for step in range(201, 1001):
        clock.now += 0.5
        bar.update(step, loss=0.25)
    lines = file.getvalue().splitlines()
    assert len(lines) == 1 + 800 * 0.5 // 30  # one each 30 s, and the last step
    assert lines[0] == ("260/1000 (26 %) · loss 0.25 · 2 steps/s · 128 samples/s · 6 TFLOP/s · 00:30 gone, 06:10 left")
    assert lines[-1].startswith("1000/1000 (100 %)")
    assert lines[-1].endswith("06:40 gone, 00:00 left")


def test_progress_rewrites_one_line_on_a_terminal(clock):
    file = Terminal()
    bar = progress(file, steps=4)
    for step in range(1, 5):
        clock.now += 1.0
        assert bar.update(step, loss=1.0)["steps_per_s"] == 1.0
    bar.close()
    assert file.getvalue().count("\n") == 1
    assert file.getvalue().count("\r\x1b[K") == 4


def test_progress_can_keep_quiet(clock):
    bar = progress(None, steps=1)
    clock.now += 1.0
    assert bar.update(1, loss=1.0) is not None
    bar.close()


def test_rates_give_mfu_where_the_peak_is_known(monkeypatch):
    monkeypatch.setattr(speed, "peak_flops", lambda kind: 100e12)
    found = cost.rates(10, 5.0, samples_per_step=32, flops_per_step=20e12)
    assert found == pytest.approx({"steps_per_s": 2, "samples_per_s": 64, "tflop_per_s": 40, "mfu": 0.4})


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("cpu", None),
    ],
)
def test_peak_of_known_devices(kind, peak):
    assert cost.peak_flops(kind) == peak


def test_cost_of_a_step_counts_every_micro_batch():
    def products(a, b):
        return jax.lax.scan(lambda total, rows: (total + rows @ b, None), jnp.zeros((16, 32)), a)[0]

    lowered = jax.jit(products).lower(jnp.ones((4, 16, 64)), jnp.ones((64, 32)))
    assert cost.step_flops(lowered, repeats=4) == pytest.approx(4 * 2 * 16 * 64 * 32, rel=0.05)


def test_compiled_step_is_described():
    lowered = jax.jit(lambda a: a @ a).lower(jnp.ones((256, 256)))
    told = cost.describe(lowered.compile(), flops=2e12, seconds=1.5)
    assert told.startswith("step compiled in 1.5 s: 2 TFLOP a step; MiB per device: arguments 0.2")


def test_clock_time():
    assert [speed.clock_time(seconds) for seconds in (5.4, 65, 3723)] == ["00:05", "01:05", "1:02:03"]


def test_metrics_are_strict_json_lines(tmp_path):
    writer = metrics.make_writer(tmp_path, tensorboard=False)
    writer.write_scalars(1, {"loss": np.float32(0.1), "size": float("nan")})
    writer.write_scalars(2, {"loss": float("inf")})
    writer.close()
    rows = metrics.read_json_lines(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 1, "loss": float(np.float32(0.1)), "size": None}, {"step": 2, "loss": None}]


def test_resuming_cuts_later_and_broken_rows(tmp_path):
    writer = metrics.make_writer(tmp_path, tensorboard=False)
    writer.resume(0)  # nothing there yet
    for step in range(1, 5):
        writer.write_scalars(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in metrics.read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    writer.resume(2)
    writer.write_scalars(3, {"loss": 30.0})
    assert [row["loss"] for row in metrics.read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 30]


def test_tensorboard_gets_the_same_scalars(tmp_path):
    pytest.importorskip("tensorflow")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = metrics.make_writer(tmp_path, tensorboard=True)
    writer.write_hparams({"optim": {"peak": 1e-3}})
    writer.write_scalars(1, {"loss": 0.5})
    writer.write_speed(1, {"steps_per_s": 2.0})
    writer.write_images(1, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert {"loss", "speed/steps_per_s", "samples"} <= set(events.Tags()["tensors"])


def test_hyper_parameters_are_flat(tmp_path):
    writer = metrics.make_writer(tmp_path, tensorboard=False)
    writer.write_hparams({"optim": {"peak": 1e-3, "betas": (0.9, 0.99)}, "name": "toy"})
    assert json.loads((tmp_path / "hparams.json").read_text()) == {
        "optim.peak": 1e-3,
        "optim.betas": "(0.9, 0.99)",
        "name": "toy",
    }


def test_the_loop_needs_no_tensorflow():
    code = (
        "import sys, instaflow_jax.train.loop; sys.exit(any(m in sys.modules for m in ('tensorflow', 'torch', 'clu')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pixels_go_to_bytes_and_are_clipped():
    pixels = np.array([-2, -1, -1 + 0.9 / 255, -1 + 1.1 / 255, 0.999, 1, 3], np.float32)
    np.testing.assert_array_equal(images.to_uint8(pixels), [0, 0, 0, 1, 255, 255, 255])


def test_grid_lays_out_row_by_row():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    made = images.grid(pictures, columns=3, row_labels=(), column_labels=(), scale=2)
    assert made.shape == (2 * 8 + images.GAP, 3 * 12 + 2 * images.GAP, 3)
    for number in range(5):
        row, column = divmod(number, 3)
        y, x = row * (8 + images.GAP), column * (12 + images.GAP)
        assert (made[y : y + 8, x : x + 12] == number).all()
    assert (made[8 + images.GAP :, 2 * (12 + images.GAP) :] == images.WHITE).all()


def test_grid_labels_leave_the_pictures_alone():
    pictures = np.zeros((2, 20, 30, 3), np.uint8)
    made = images.grid(pictures, columns=1, row_labels=("one", "a longer one"), column_labels=("x",), scale=1)
    black = (made == 0).all(-1)
    assert black[images.LINE : images.LINE + 20, -30:].all()
    assert black[-20:, -30:].all()
    assert (made[:, :-30] < 128).any()  # writing in the margin
    assert (made[: images.LINE, -30:] < 128).any()  # and above


def test_grid_refuses_what_it_cannot_lay_out():
    with pytest.raises(ValueError, match="row_labels has 1 labels for a grid of 2"):
        images.grid(np.zeros((2, 4, 4, 3), np.uint8), columns=1, row_labels=("a",), column_labels=(), scale=1)
    with pytest.raises(ValueError, match="at least one picture"):
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


@pytest.mark.parametrize(
    "given,said,wish",
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_huge_pages_are_asked_for_where_the_system_waits_for_it(given, said, wish, tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(huge_pages, "_GIVEN", tmp_path / "enabled")
    if given:
        (tmp_path / "enabled").write_text(given)
    if said:
        monkeypatch.setenv("GLIBC_TUNABLES", said)
    assert huge_pages.wish() == ({"GLIBC_TUNABLES": wish} if wish else {})


def test_asking_for_huge_pages_keeps_process_arguments_and_environment(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never")
    program = f"""if True:
        import os, pathlib, sys
        from instaflow_jax.infra import huge_pages
        print(os.getpid(), sys.argv[1:], os.environ["KEPT"], os.environ.get("GLIBC_TUNABLES"), flush=True)
        huge_pages._GIVEN = pathlib.Path({str(tmp_path / "enabled")!r})
        huge_pages.ask()
        sys.exit(3)
    """
    with subprocess.Popen(
        [sys.executable, "-c", program, "a b", "--c"],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "KEPT": "yes"},
    ) as child:
        lines = child.stdout.read().splitlines()
    assert lines == [f"{child.pid} ['a b', '--c'] yes None", f"{child.pid} ['a b', '--c'] yes glibc.malloc.hugetlb=1"]
    assert child.returncode == 3
