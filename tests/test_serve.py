"""Stage `serve`: what it draws, what it refuses, and its page, used through gradio's client and a browser."""

import itertools
import os
import runpy
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from helpers import free_port

from instaflow_jax import main, pipeline
from instaflow_jax.infra import images
from instaflow_jax.stages.serve import models
from instaflow_jax.stages.serve import stage as serve
from tools.measure_web import CHROMIUM, open_tab

pytestmark = pytest.mark.usefixtures("fast_compilation")

ROOT = Path(__file__).parent.parent


def read(stage):
    return runpy.run_path(str(ROOT / "configs" / f"{stage}.py"))["get_config"]()


def tiny(folder, **changed):
    """The shipped config on the tiny model, as flow and as its own teacher."""
    config = read("serve")
    config.update(
        {
            "model": str(folder),
            "dynamics": "flow",
            "N": (1, 2),
            "teacher": str(folder),
            "teacher_N": 3,
            "port": free_port(),
        }
        | changed
    )
    return config


# ---------------------------------------------------------------- functions


def fake_model(title, choices, max_tokens=5):
    """Draws one pixel whose channels are the seed, N and the prompt's length; every word is one token."""
    return models.Model(
        title,
        choices,
        max_tokens,
        lambda prompt: len(prompt.split()),
        lambda prompt, seed, N: np.full((1, 1, 3), (seed, N, len(prompt)), np.uint8),
    )


def respond(*request):
    both = [fake_model("flow", (1, 4)), fake_model("teacher", (25,), max_tokens=4)]
    return list(models.make_respond(both, max_chars=30, max_images=3)(*request))


def test_flow_and_teacher_draw_the_same_seeds_each_with_its_own_N():
    flow, teacher = respond(" red apple ", 7.0, 4, 2)
    assert (flow.title, flow.N, teacher.title, teacher.N) == ("flow", 4, "teacher", 25)
    assert flow.seeds == teacher.seeds == (7, 8)
    assert [tuple(p[0, 0]) for p in flow.images] == [(7, 4, 9), (8, 4, 9)]  # nine characters: no spaces around
    assert [tuple(p[0, 0]) for p in teacher.images] == [(7, 25, 9), (8, 25, 9)]
    assert all(len(result.seconds) == 2 and min(result.seconds) > 0 for result in (flow, teacher))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("", 0, 1, 1), "the prompt is empty"),
        ((None, 0, 1, 1), "the prompt is empty"),
        (("a b c d e", 0, 1, 1), "the prompt has 5 tokens; use at most 4"),
        (("x" * 31, 0, 1, 1), "the prompt has 31 characters; use at most 30"),
        (("cat", -1, 1, 1), "the seed must be an integer from 0 to 4294967295, not -1"),
        (("cat", 2**32 - 1, 1, 2), "the seed must be an integer from 0 to 4294967294"),
        (("cat", 0.5, 1, 1), "the seed must be an integer"),
        (("cat", None, 1, 1), "the seed must be an integer"),
        (("cat", float("inf"), 1, 1), "the seed must be an integer"),
        (("cat", float("nan"), 1, 1), "the seed must be an integer"),
        (("cat", 0, 2, 1), "N=2 is not available; use one of 1, 4 solver steps"),
        (("cat", 0, 1, 0), "the number of images must be an integer from 1 to 3, not 0"),
        (("cat", 0, 1, 4), "the number of images must be an integer from 1 to 3, not 4"),
    ],
)
def test_requests_out_of_bounds_are_refused(request_, words):
    with pytest.raises(ValueError, match=words):
        respond(*request_)


def test_tokens_are_counted_as_the_tokenizer_cuts_them():
    tokenizer = pipeline.Tokenizer.from_pretrained(pipeline.locate("openmoji"))
    room = tokenizer.model_max_length - 2
    cat = tokenizer(["cat"])[0, 1]
    for words in (1, room, room + 1):
        prompt = " ".join(["cat"] * words)
        assert tokenizer.count(prompt) == words
        if words <= room:
            assert np.sum(tokenizer([prompt]) == cat) == words
    with pytest.warns(UserWarning, match="these words are lost"):
        tokenizer([prompt])


@pytest.mark.slow
def test_an_image_is_the_one_that_sample_draws(teacher, tmp_path):
    pipe = pipeline.load(str(teacher), variant=None, attention="xla")
    model = models.make_model(pipe, "tiny", dynamics="flow", alpha=1.0, choices=(2,))
    config = read("sample")
    config.update(
        {"model": str(teacher), "dynamics": "flow", "N": 2, "alpha": 1.0, "prompts": "cat face", "seeds": (5,)}
    )
    main.run(config, str(tmp_path))
    expected, _ = images.load_png(tmp_path / "sample" / "000_cat-face_seed5_N2_alpha1.png")
    image = model.draw("cat face", 5, 2)
    assert np.ptp(image) > 0
    np.testing.assert_allclose(image.astype(int), expected.astype(int), atol=1)


def test_the_model_is_the_distilled_one_if_there_is_one(tmp_path, capsys):
    source, notice = serve.find_model("", "openmoji", tmp_path)
    assert source == "" and "no one-step model in" in notice and notice in capsys.readouterr().out
    distilled = tmp_path / "distill" / "export"
    distilled.mkdir(parents=True)
    (distilled / "model_index.json").touch()
    assert serve.find_model("", "openmoji", tmp_path) == (str(distilled), "")
    assert serve.find_model("elsewhere", "openmoji", tmp_path) == ("elsewhere", "")


def test_without_model_and_teacher_there_is_nothing_to_show(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no one-step model .* Use --config.model"):
        serve.find_model("", "", tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "int8"}, "config.dtype='int8' is not one of"),
        ({"queue": 0}, "config.queue=0 must be at least 1"),
        ({"N": ()}, "must have at least one value"),
        ({"host": "256.0.0.1"}, "cannot listen at config.host='256.0.0.1'"),
    ],
)
def test_bad_settings_end_in_one_clear_message_before_anything_is_loaded(fields, words):
    config = read("serve")
    config.update({"model": "nowhere", "port": free_port()} | fields)
    with pytest.raises((ValueError, OSError), match=words):
        serve.start(config, "nowhere")


def test_a_port_that_is_taken_is_named():
    config = read("serve")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config.port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"config.port={config.port}: .* use another --config.port"):
            serve.start(config, "nowhere")


def test_the_headings_name_steps_and_not_paths():
    flow, teacher = models.heading("", 1), models.heading("teacher", 25)
    assert (flow, teacher, models.heading("", 4)) == ("one step", "teacher, 25 steps", "4 steps")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"teacher": "nowhere"}, "nowhere"),
        ({"teacher_N": 1001}, "N=1001"),
        ({"examples": ()}, "config.examples"),
    ],
)
def test_both_models_are_checked_before_the_first_is_compiled(fields, words, teacher, monkeypatch):
    monkeypatch.setattr(serve, "make_model", lambda *_, **__: pytest.fail("compiled"))
    for act in (serve.start, serve.check):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            act(tiny(teacher, **fields), "nowhere")


def test_a_missing_gradio_ends_in_one_line_that_names_the_extra(monkeypatch):
    config = read("serve")
    config.port = free_port()
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "instaflow_jax.stages.serve.page", raising=False)
    monkeypatch.delattr("instaflow_jax.stages.serve.page", raising=False)
    with pytest.raises(ValueError, match=r"'serve' needs the package 'gradio'.* use pip install -e '\.\[serve\]'"):
        main.run(config, "nowhere")


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(teacher):
    """The page of the tiny models, served from this process."""
    running = serve.start(tiny(teacher), "nowhere")
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(page):
    return Client(page.local_url, verbose=False, analytics_enabled=False)


@pytest.mark.slow
def test_the_page_answers_with_images_and_seconds(client, teacher):
    flow_line, flow, teacher_line, reference = client.predict("cat face", 3, 2, 2, api_name="/draw")
    assert flow_line.startswith("### 2 steps · 0.") and flow_line.endswith("s per image")
    assert teacher_line.startswith("### teacher, 3 steps · ")
    flow, reference = flow["value"], reference["value"]
    for gallery in (flow, reference):
        assert [entry["caption"] for entry in gallery] == ["seed 3", "seed 4"]
        assert all(Path(entry["image"]).suffix == ".png" for entry in gallery)
    once = client.predict("cat face", 4, 2, 1, api_name="/draw")[1]["value"]
    pixels = [images.load_png(entry["image"])[0] for entry in (flow[1], once[0], flow[0])]
    np.testing.assert_array_equal(pixels[0], pixels[1])  # seed 4, with others and alone
    assert np.any(pixels[0] != pixels[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("cat " * 50, 0, 1, 1), "the prompt has 50 tokens; use at most 14"),
        (("x" * 600, 0, 1, 1), "500"),
        (("cat", -5, 1, 1), "-5"),
        (("cat", 0, 7, 1), "7"),
        (("cat", 0, 1, 99), "99"),
    ],
)
def test_the_page_shows_what_is_wrong_as_text(client, request_, words):
    with pytest.raises(AppError, match=words):
        client.predict(*request_, api_name="/draw")


@pytest.mark.slow
def test_requests_cannot_skip_the_queue_or_upload_files(page):
    """Only this machine reaches the page, and drawing is all it offers."""
    assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None
    run = httpx.post(f"{page.local_url}gradio_api/run/draw", json={"data": ["cat", 0, 1, 1]})
    assert run.status_code >= 400
    upload = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": ("a.txt", b"much too large")})
    assert upload.status_code >= 400


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_machine_does_not_keep_the_page_from_opening(variable, monkeypatch):
    from instaflow_jax.stages.serve import page as serve_page

    monkeypatch.setenv(variable, {"ALL_PROXY": "socks5://127.0.0.1:9"}.get(variable, "http://127.0.0.1:9"))
    monkeypatch.setenv("no_proxy", "example.org")
    model, limits = fake_model("", (1,)), {"max_chars": 9, "max_images": 1}
    page = serve_page.make_page([model], models.make_respond([model], **limits), notice="", examples=("a",), **limits)
    try:
        url = serve_page.open_page(page, host="127.0.0.1", port=free_port(), queue=1)
        assert httpx.get(url, trust_env=False).status_code == 200
        assert os.environ["no_proxy"] == "example.org" and "NO_PROXY" not in os.environ
    finally:
        page.close()


@pytest.mark.slow
def test_requests_beyond_the_queue_are_refused():
    from instaflow_jax.stages.serve import page as serve_page

    started, proceed = threading.Event(), threading.Event()

    def wait(prompt, seed, N):
        started.set()
        assert proceed.wait(60)
        return np.zeros((8, 8, 3), np.uint8)

    model, limits = models.Model("slow", (1,), 5, len, wait), {"max_chars": 9, "max_images": 1}
    respond = models.make_respond([model], **limits)
    page = serve_page.make_page([model], respond, notice="slow", examples=("cat",), **limits)
    try:
        client = Client(
            serve_page.open_page(page, host="127.0.0.1", port=free_port(), queue=1),
            verbose=False,
            analytics_enabled=False,
        )
        first = client.submit("cat", 0, 1, 1, api_name="/draw")
        assert started.wait(60)
        waiting = [client.submit("cat", 0, 1, 1, api_name="/draw") for _ in range(3)]
        refused = [job.exception(timeout=60) for job in itertools.islice(finished(waiting), 2)]
        assert all("queue is full" in str(error).lower() for error in refused), refused
        proceed.set()
        assert len(first.result(timeout=60)[1]["value"]) == 1
        assert sum(job.exception(timeout=60) is None for job in waiting) == 1
    finally:
        proceed.set()
        page.close()


def finished(jobs):
    """Yields the jobs in the order in which they end."""
    running = list(jobs)
    while running:
        for job in [job for job in running if job.done()]:
            running.remove(job)
            yield job
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the tests above use gradio's client")
def test_the_page_in_a_browser(page, tmp_path):
    """Draws, enlarges without smoothing, shows an error, and loads nothing from other servers."""
    with open_tab("--disable-gpu") as tab:
        requested = []
        tab.on("request", lambda request: requested.append(request.url))
        tab.goto(page.local_url)
        tab.get_by_label("Prompt").fill("red apple")
        tab.get_by_role("button", name="Draw", exact=True).click()
        tab.get_by_text("3 steps · ").wait_for()
        assert tab.get_by_text("one step · ").is_visible()
        drawn = tab.locator(".images.small img")
        drawn.nth(1).wait_for()
        assert drawn.count() == 2
        style, width, shown = drawn.nth(0).evaluate(
            "p => [getComputedStyle(p).imageRendering, p.naturalWidth, p.getBoundingClientRect().width]"
        )
        assert (style, width) == ("pixelated", 4) and shown > 100

        tab.get_by_label("Prompt").fill("cat " * 50)
        tab.get_by_role("button", name="Draw", exact=True).click()
        tab.get_by_text("the prompt has 50 tokens; use at most 14").wait_for()
        tab.screenshot(path=tmp_path / "page.png")
    foreign = [url for url in requested if not url.startswith((page.local_url, "data:", "blob:"))]
    assert requested and not foreign
