"""Stage `serve`: what it draws, what it refuses, and its page, asked through gradio's client and by a browser."""

import itertools
import runpy
import shutil
import socket
import tempfile
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
from instaflow_jax.stages.serve import stage as serve

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def read(stage):
    return runpy.run_path(str(ROOT / "configs" / f"{stage}.py"))["get_config"]()


def tiny(folder, **changed):
    """The shipped config on the tiny model, as flow and as its own teacher."""
    config = read("serve")
    config.update(
        {
            "model": str(folder),
            "dynamics": "flow",
            "steps": (1, 2),
            "teacher": str(folder),
            "teacher_N": 3,
            "port": free_port(),
        }
        | changed
    )
    return config


# ---------------------------------------------------------------- functions


def stand_in(title, counts, room=5):
    """Draws one pixel that tells seed and steps; words are tokens."""
    return serve.Painter(
        title,
        counts,
        room,
        lambda prompt: len(prompt.split()),
        lambda prompt, seed, N: np.full((1, 1, 3), (seed, N, len(prompt)), np.uint8),
    )


def respond(*request):
    painters = [stand_in("flow", (1, 4)), stand_in("teacher", (25,), room=4)]
    return list(serve.make_respond(painters, max_chars=30, max_pictures=3)(*request))


def test_flow_and_teacher_draw_the_same_seeds_each_with_its_steps():
    flow, teacher = respond(" red apple ", 7.0, 4, 2)
    assert (flow.title, flow.N, teacher.title, teacher.N) == ("flow", 4, "teacher", 25)
    assert flow.seeds == teacher.seeds == (7, 8)
    assert [tuple(p[0, 0]) for p in flow.pictures] == [(7, 4, 9), (8, 4, 9)]  # nine letters: no blanks around them
    assert [tuple(p[0, 0]) for p in teacher.pictures] == [(7, 25, 9), (8, 25, 9)]
    assert all(len(drawn.seconds) == 2 and min(drawn.seconds) > 0 for drawn in (flow, teacher))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("", 0, 1, 1), "write a prompt"),
        ((None, 0, 1, 1), "write a prompt"),
        (("a b c d e", 0, 1, 1), "the prompt has 5 tokens, but 4 fit"),
        (("x" * 31, 0, 1, 1), "the prompt has 31 characters; at most 30"),
        (("cat", -1, 1, 1), "the seed must be a whole number from 0 to 4294967295, not -1"),
        (("cat", 2**32 - 1, 1, 2), "the seed must be a whole number from 0 to 4294967294"),
        (("cat", 0.5, 1, 1), "the seed must be a whole number"),
        (("cat", None, 1, 1), "the seed must be a whole number"),
        (("cat", float("inf"), 1, 1), "the seed must be a whole number"),
        (("cat", float("nan"), 1, 1), "the seed must be a whole number"),
        (("cat", 0, 2, 1), "2 steps are not among the possible 1, 4"),
        (("cat", 0, 1, 0), "the number of pictures must be a whole number from 1 to 3, not 0"),
        (("cat", 0, 1, 4), "the number of pictures must be a whole number from 1 to 3, not 4"),
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


def test_a_picture_is_the_one_that_sample_draws(teacher, tmp_path):
    painter = serve.make_painter(
        pipeline.load(str(teacher), variant=None, attention="xla"), "tiny", kind="flow", alpha=1.0, counts=(2,)
    )
    config = read("sample")
    config.update(
        {"model": str(teacher), "dynamics": "flow", "N": 2, "alpha": 1.0, "prompts": "cat face", "seeds": (5,)}
    )
    main.run(config, str(tmp_path))
    expected, _ = images.load_png(tmp_path / "sample" / "000_cat-face_seed5_N2_alpha1.png")
    picture = painter.draw("cat face", 5, 2)
    assert np.ptp(picture) > 0
    np.testing.assert_allclose(picture.astype(int), expected.astype(int), atol=1)


def test_the_model_is_the_distilled_one_where_there_is_one(tmp_path, capsys):
    config = read("serve")
    source, notice = serve.find_model(config, str(tmp_path))
    assert source == "" and "no one-step model in" in notice and notice in capsys.readouterr().out
    made = tmp_path / "distill" / "export"
    made.mkdir(parents=True)
    (made / "model_index.json").touch()
    assert serve.find_model(config, str(tmp_path)) == (str(made), "")
    config.model = "elsewhere"
    assert serve.find_model(config, str(tmp_path)) == ("elsewhere", "")


def test_without_model_and_teacher_there_is_nothing_to_show(tmp_path):
    config = read("serve")
    config.teacher = ""
    with pytest.raises(FileNotFoundError, match=r"no one-step model .* Name another by --config.model"):
        serve.find_model(config, str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "int8"}, "config.dtype='int8' is not one of"),
        ({"queue": 0}, "config.queue=0 must be at least 1"),
        ({"steps": ()}, "must name at least one number of steps"),
        ({"host": "256.0.0.1"}, "cannot listen at config.host='256.0.0.1'"),
    ],
)
def test_bad_settings_end_in_one_clear_message_before_anything_is_loaded(fields, words):
    config = read("serve")
    config.update({"model": "nowhere", "port": free_port()} | fields)
    with pytest.raises((ValueError, OSError), match=words):
        serve.start(config, "nowhere")


def test_a_port_that_is_taken_and_a_missing_gradio_say_so(monkeypatch):
    config = read("serve")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config.port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"config.port={config.port}: .* try another --config.port"):
            serve.check(config)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e .\[serve\]"):
        serve.check(config)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(teacher):
    """The whole stage, served from this process."""
    running = serve.start(tiny(teacher), "nowhere")
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(page):
    return Client(page.local_url, verbose=False, analytics_enabled=False)


def test_the_page_answers_with_pictures_and_seconds(client, teacher):
    flow_line, flow, teacher_line, reference = client.predict("cat face", 3, 2, 2, api_name="/draw")
    assert flow_line.startswith("### 2 steps · 0.") and "s a picture" in flow_line and str(teacher) in flow_line
    assert teacher_line.startswith("### 3 steps · ")
    flow, reference = flow["value"], reference["value"]
    for gallery in (flow, reference):
        assert [entry["caption"] for entry in gallery] == ["seed 3", "seed 4"]
        assert all(Path(entry["image"]).suffix == ".png" for entry in gallery)
    once = client.predict("cat face", 4, 2, 1, api_name="/draw")[1]["value"]
    pixels = [images.load_png(entry["image"])[0] for entry in (flow[1], once[0], flow[0])]
    np.testing.assert_array_equal(pixels[0], pixels[1])  # seed 4, with others and alone
    assert np.any(pixels[0] != pixels[2])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("cat " * 50, 0, 1, 1), "the prompt has 50 tokens, but 14 fit"),
        (("x" * 600, 0, 1, 1), "500"),
        (("cat", -5, 1, 1), "-5"),
        (("cat", 0, 7, 1), "7"),
        (("cat", 0, 1, 99), "99"),
    ],
)
def test_the_page_shows_what_is_wrong_as_text(client, request_, words):
    with pytest.raises(AppError, match=words):
        client.predict(*request_, api_name="/draw")


def test_nobody_goes_past_the_queue_or_leaves_files(page):
    """The page is open to this machine alone, and offers drawing alone."""
    assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None
    asked = httpx.post(f"{page.local_url}gradio_api/run/draw", json={"data": ["cat", 0, 1, 1]})
    assert asked.status_code >= 400
    left = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": ("a.txt", b"much too large")})
    assert left.status_code >= 400


def test_requests_beyond_the_queue_are_turned_away():
    from instaflow_jax.stages.serve import page as serve_page

    begun, go_on = threading.Event(), threading.Event()

    def wait(prompt, seed, N):
        begun.set()
        assert go_on.wait(60)
        return np.zeros((8, 8, 3), np.uint8)

    painter = serve.Painter("slow", (1,), 5, len, wait)
    page = serve_page.make_page(
        [painter],
        serve.make_respond([painter], max_chars=9, max_pictures=1),
        notice="slow",
        examples=("cat",),
        max_chars=9,
        max_pictures=1,
    )
    try:
        client = Client(
            serve_page.open_page(page, host="127.0.0.1", port=free_port(), queue=1),
            verbose=False,
            analytics_enabled=False,
        )
        drawn = client.submit("cat", 0, 1, 1, api_name="/draw")
        assert begun.wait(60)
        waiting = [client.submit("cat", 0, 1, 1, api_name="/draw") for _ in range(3)]
        refused = [job.exception(timeout=60) for job in itertools.islice(finished(waiting), 2)]
        assert all("queue is full" in str(error).lower() for error in refused), refused
        go_on.set()
        assert len(drawn.result(timeout=60)[1]["value"]) == 1
        assert sum(job.exception(timeout=60) is None for job in waiting) == 1
    finally:
        go_on.set()
        page.close()


def finished(jobs):
    """The jobs as they end, whichever is first."""
    left = list(jobs)
    while left:
        for job in [job for job in left if job.done()]:
            left.remove(job)
            yield job
        time.sleep(0.02)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the tests above ask through gradio's client")
def test_the_page_in_a_browser(page, tmp_path):
    """Draws, enlarges without smoothing, says what is wrong, and fetches nothing from elsewhere."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers, tempfile.TemporaryDirectory() as profile:
        browser = browsers.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        tab = browser.new_page()
        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.local_url)
        tab.get_by_label("Prompt").fill("red apple")
        tab.get_by_role("button", name="Draw", exact=True).click()
        tab.get_by_text("3 steps · ").wait_for()
        assert tab.get_by_text("1 step · ").is_visible()
        pictures = tab.locator(".pictures.small img")
        pictures.nth(1).wait_for()
        assert pictures.count() == 2
        style, width, shown = pictures.nth(0).evaluate(
            "p => [getComputedStyle(p).imageRendering, p.naturalWidth, p.getBoundingClientRect().width]"
        )
        assert (style, width) == ("pixelated", 4) and shown > 100

        tab.get_by_label("Prompt").fill("cat " * 50)
        tab.get_by_role("button", name="Draw", exact=True).click()
        tab.get_by_text("the prompt has 50 tokens, but 14 fit").wait_for()
        tab.screenshot(path=tmp_path / "page.png")
        browser.close()
    strangers = [url for url in asked if not url.startswith((page.local_url, "data:", "blob:"))]
    assert asked and not strangers
