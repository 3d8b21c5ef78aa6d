"""Measures the page of the export format `web` in headless Chromium:

    python -m tools.measure_web DIR/export/web --model DIR/distill/export --count 20

prints the backend, the seconds until the page can draw, the median seconds of an image as the page shows them, and how
far its images are from those that this package draws with the model. The tests open the page with the same functions.
Chromium is a system package; playwright drives it.
"""

import argparse
import contextlib
import functools
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from instaflow_jax import pipeline, sampling

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the page of the export format 'web'")
    parser.add_argument("folder", type=Path, help="the exported folder")
    parser.add_argument("--model", required=True, help="the flow that was exported, in diffusers layout")
    parser.add_argument("--count", type=int, default=20, help="number of images, of the page's first prompt")
    args = parser.parse_args()
    if CHROMIUM is None:
        parser.error("there is no Chromium on this machine; install the system's package chromium")
    with serve(args.folder) as url, open_tab("--disable-gpu") as tab:
        start = time.perf_counter()
        tab.goto(url)
        status = wait_until_ready(tab)
        print(f"{status} after {time.perf_counter() - start:.1f} s")
        prompt = tab.get_by_label("Prompt").input_value()
        drawn = [(draw(tab, seed), pixels(tab)) for seed in range(args.count)]
    seconds, images = zip(*drawn, strict=True)
    print(f"{args.count} images: median {statistics.median(seconds):.3f} s, least {min(seconds):.3f} s")
    difference = np.abs(np.stack(images).astype(int) - ours(args.model, prompt, args.count))
    print(
        f"differs from ours by at most {difference.max()} of 255 levels, in {np.mean(difference > 0):.2%} of the values"
    )


def ours(model: str, prompt: str, count: int) -> UInt8[np.ndarray, "B H W 3"]:
    """The one-step images of the seeds from 0 on."""
    pipe = pipeline.load(model, variant=None, attention="xla")
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
    solve = sampling.make_solve(pipe.nets["unet"].apply, dynamics, "euler", 1, 1.0)
    noise = sampling.noise(np.arange(count, dtype=np.uint32), pipe.latent_shape)
    ids, null = pipe.tokenizer([prompt] * count), pipe.tokenizer([""])
    return np.asarray(jax.jit(sampling.make_generate(pipe.nets, solve))(pipe.params, ids, null, noise)[0])


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of `folder`, served from a thread as `python -m http.server` serves it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def open_tab(*flags: str) -> Iterator[Any]:
    """playwright's page in a new headless Chromium with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers, tempfile.TemporaryDirectory() as profile:
        browser = browsers.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=(*FLAGS, *flags)
        )
        try:
            yield browser.new_page()
        finally:
            browser.close()


def wait_until_ready(tab: Any) -> str:
    """The page's status once the model has loaded, "Ready (BACKEND).", or why it has not."""
    status = tab.locator("#status").filter(has_text=re.compile("^Ready|does not run"))
    status.wait_for(timeout=300_000)
    return status.inner_text()


def draw(tab: Any, seed: int) -> float:
    """Draws the prompt in the page's field; returns the seconds that the page shows."""
    tab.get_by_label("Seed").fill(str(seed))
    tab.get_by_role("button", name="Draw", exact=True).click()
    tab.get_by_text(re.compile(rf", seed {seed}$")).wait_for()
    return float(re.search(r"([\d.]+) s", tab.locator("#heading").inner_text())[1])


def pixels(tab: Any) -> UInt8[np.ndarray, "H W 3"]:
    """The image that the page shows."""
    program = """image => [image.height, image.width,
        [...image.getContext("2d").getImageData(0, 0, image.width, image.height).data]]"""
    height, width, rgba = tab.locator("#image").evaluate(program)
    return np.array(rgba, np.uint8).reshape(height, width, 4)[..., :3]


if __name__ == "__main__":
    main()
