"""Stage `serve`: what it draws, what it refuses, and its page, used through gradio's client and a browser."""

import itertools
import os
import runpy
import socket
import sys
import threading
import time
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from helpers import free_port
from PIL import Image

import instaflow_jax
from instaflow_jax import main, pipeline
from instaflow_jax.infra import images
from instaflow_jax.stages.serve import models, requests, session
from instaflow_jax.stages.serve import stage as serve
from instaflow_jax.stages.serve.page import events
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
            "teacher_alpha": 3.0,
            "port": free_port(),
        }
        | changed
    )
    return config


# ---------------------------------------------------------------- functions


def fake_model(title, choices, max_tokens=5, alpha=1.0):
    """Draws one pixel whose channels are the seed, N and the prompt's length; every word is one token."""

    def draw(settings, files, report):
        for done in range(settings.N):
            report(done + 1)
        return np.full((1, 1, 3), (settings.seed, settings.N, len(settings.prompt)), np.uint8)

    return models.Model(title, choices, max_tokens, lambda prompt: len(prompt.split()), draw, alpha, f"{title}'s files")


BOTH = [fake_model("", (1, 4)), fake_model("teacher", (25,), max_tokens=4, alpha=3.0)]


def respond(*request, **options):
    return list(requests.make_respond(BOTH, max_chars=30, max_images=3)(*request, **options))


def test_flow_and_teacher_draw_the_same_seeds_each_with_its_own_N():
    flow, teacher = respond(" red apple ", 7.0, 4, 2)
    assert (flow.heading, teacher.heading) == ("4 steps", "teacher, 25 steps")
    for result in (flow, teacher):
        assert [settings.seed for settings in result.settings] == [7, 8]
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negative": "a b c d e"}, "the negative prompt has 5 tokens; use at most 4"),
        ({"negative": "dog", "alphas": [1]}, "the negative prompt has no effect without guidance; use a guidance abov"),
        ({"alphas": [0.5]}, "the guidance must be a number from 1 to 30, not 0.5"),
        ({"alphas": [None]}, "the guidance must be a number from 1 to 30, not None"),
        ({"position": 1.5}, "the position between the seeds must be a number from 0 to 1, not 1.5"),
        ({"position": 0.5}, "the second seed must be an integer from 0 to 4294967295, not None"),
        ({"position": 0.5, "second_seed": -1}, "the second seed must be an integer from 0 to 4294967295, not -1"),
    ],
)
def test_walks_and_guidance_out_of_bounds_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        respond("cat", 0, 1, 1, **options)


def test_only_a_model_with_guidance_gets_it():
    flow, teacher = respond("cat", 0, 1, 1, negative="dog", alphas=[5])
    assert flow.settings == [models.Settings("cat", seed=0, N=1)]
    assert teacher.settings == [models.Settings("cat", seed=0, N=25, negative="dog", alpha=5.0)]
    assert respond("cat", 0, 1, 1)[1].settings[0].alpha == 3.0  # the model's own
    with pytest.raises(ValueError, match="no effect without guidance"):
        list(requests.make_respond(BOTH[:1], max_chars=9, max_images=1)("cat", 0, 1, 1, negative="dog"))


def test_every_image_walks_from_its_seed_to_its_second_seed():
    for result in respond("cat", 7, 1, 2, second_seed=20, position=0.25):
        assert [(s.seed, s.second_seed, s.position) for s in result.settings] == [(7, 20, 0.25), (8, 21, 0.25)]


def test_steps_are_reported_over_all_images():
    heard = []
    respond("cat", 0, 1, 2, report=lambda *told: heard.append(told))
    assert heard[:2] == [("one step", 1, 2), ("one step", 2, 2)]
    assert heard[2:] == [("teacher, 25 steps", done + 1, 50) for done in range(50)]


# ---------------------------------------------------------------- the session


def test_a_saved_image_carries_its_settings(tmp_path):
    _, teacher = respond("red apple", 7, 1, 2, second_seed=20, position=0.25, negative="green", alphas=[5])
    column = session.save(teacher, tmp_path)
    assert column.small and column.line.startswith("### teacher, 25 steps · ") and column.line.endswith("per image")
    assert [caption for _, caption in column.files] == ["seed 7 to 20 at 0.25", "seed 8 to 21 at 0.25"]
    path = column.files[0][0]
    assert path.name == "red-apple_seed7_to_20_at_0.25_N25.png"
    with Image.open(path) as file:
        assert file.text == {
            "prompt": "red apple",
            "negative": "green",
            "seed": "7",
            "second_seed": "20",
            "position": "0.25",
            "N": "25",
            "alpha": "5",
            "model": "teacher's files",
            "version": f"instaflow_jax {instaflow_jax.__version__}",
        }
        np.testing.assert_array_equal(np.asarray(file), teacher.images[0])


def test_the_download_is_one_image_or_a_zip_of_all(tmp_path):
    one, two = (session.save(respond("cat", 0, 1, count)[0], tmp_path) for count in (1, 2))
    assert session.download(one) == one.files[0][0]
    with zipfile.ZipFile(session.download(two)) as file:
        assert file.namelist() == ["cat_seed0_N1.png", "cat_seed1_N1.png"]
        assert file.read("cat_seed1_N1.png") == two.files[1][0].read_bytes()
    one.files[0][0].unlink()
    assert session.download(one) is None


def test_a_session_keeps_the_newest_drawings_once_while_their_files_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "KEPT", 3)
    drawings = [
        session.Drawing((i,), (session.save(respond("cat", i, 1, 1)[0], tmp_path),)) for i in range(session.KEPT + 2)
    ]
    kept = []
    for drawing in drawings:
        kept = session.remember(drawing, kept)
    assert kept == drawings[:1:-1]
    again = session.Drawing((3,), drawings[3].columns)
    assert [drawing.fields for drawing in session.remember(again, kept)] == [(3,), (4,), (2,)]
    drawings[4].columns[0].files[0][0].unlink()
    assert [drawing.fields for drawing in session.remember(again, kept)] == [(3,), (2,)]


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
@pytest.mark.parametrize(("dynamics", "alpha", "negative"), [("flow", 1.0, ""), ("teacher", 3.0, "house")])
def test_an_image_is_the_one_that_sample_draws(dynamics, alpha, negative, teacher, tmp_path):
    pipe = pipeline.load(str(teacher), variant=None, attention="xla")
    model = models.make_model(pipe, "tiny", dynamics=dynamics, alpha=alpha, choices=(2,))
    common = {"N": 2, "alpha": alpha, "negative": negative}
    config = read("sample")
    config.update({"model": str(teacher), "dynamics": dynamics, "prompts": "cat face", "seeds": (5, 6), **common})
    main.run(config, str(tmp_path))
    steps = []
    for seed, walk in ((5, {}), (6, {"second_seed": 6, "seed": 5, "position": 1.0})):
        expected, _ = images.load_png(tmp_path / "sample" / f"000_cat-face_seed{seed}_N2_alpha{alpha:g}.png")
        image = model.draw(models.Settings("cat face", **({"seed": seed} | walk | common)), [], steps.append)
        assert np.ptp(image) > 0
        np.testing.assert_allclose(image.astype(int), expected.astype(int), atol=1)
    assert steps == [1, 2, 1, 2]


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
    for module in ("layout", "events", "server"):
        monkeypatch.delitem(sys.modules, f"instaflow_jax.stages.serve.page.{module}", raising=False)
        monkeypatch.delattr(f"instaflow_jax.stages.serve.page.{module}", raising=False)
    with pytest.raises(ValueError, match=r"'serve' needs the package 'gradio'.* use pip install -e '\.\[serve\]'"):
        main.run(config, "nowhere")


# ---------------------------------------------------------------- the page

NAMES = ["prompt", "seed", "N", "count", "second_seed", "position", "negative", "teacher_alpha"]
VALUES = ["cat", 0, 1, 1, 9, 0, "", 3.0]


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
def test_the_api_takes_every_field_of_the_page_by_name(client):
    (endpoint,) = client.view_api(return_format="dict", print_info=False)["named_endpoints"].values()
    names = [parameter["parameter_name"] for parameter in endpoint["parameters"]]
    assert names == ["prompt", "seed", "N", "count", "second_seed", "position", "negative", "teacher_alpha"]

    def draw(**fields):
        flow, teacher = client.predict(prompt="cat face", N=2, **fields, api_name="/draw")[1::2]
        return [images.load_png(gallery["value"][0]["image"]) for gallery in (flow, teacher)]

    plain, walked = draw(seed=4), draw(seed=3, second_seed=4, position=1.0)
    guided = draw(seed=4, negative="house", teacher_alpha=9.0)
    for (image, _), (there, text) in zip(plain, walked, strict=True):
        np.testing.assert_array_equal(image, there)
        assert (text["seed"], text["second_seed"], text["position"]) == ("3", "4", "1")
    np.testing.assert_array_equal(plain[0][0], guided[0][0])  # the flow is not guided
    assert np.any(plain[1][0] != guided[1][0])
    assert [(text["negative"], text["alpha"]) for _, text in guided] == [("", "1"), ("house", "9")]


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
    from instaflow_jax.stages.serve.page import layout, server

    monkeypatch.setenv(variable, {"ALL_PROXY": "socks5://127.0.0.1:9"}.get(variable, "http://127.0.0.1:9"))
    monkeypatch.setenv("no_proxy", "example.org")
    model, limits = fake_model("", (1,)), {"max_chars": 9, "max_images": 1}
    page = layout.make_page([model], requests.make_respond([model], **limits), notice="", examples=("a",), **limits)
    try:
        url = server.open_page(page, host="127.0.0.1", port=free_port(), queue=1)
        assert httpx.get(url, trust_env=False).status_code == 200
        assert os.environ["no_proxy"] == "example.org" and "NO_PROXY" not in os.environ
    finally:
        page.close()


@pytest.mark.slow
def test_requests_beyond_the_queue_are_refused():
    from instaflow_jax.stages.serve.page import layout, server

    started, proceed = threading.Event(), threading.Event()

    def wait(settings, files, report):
        started.set()
        assert proceed.wait(60)
        return np.zeros((8, 8, 3), np.uint8)

    model, limits = models.Model("slow", (1,), 5, len, wait), {"max_chars": 9, "max_images": 1}
    respond = requests.make_respond([model], **limits)
    page = layout.make_page([model], respond, notice="slow", examples=("cat",), **limits)
    try:
        client = Client(
            server.open_page(page, host="127.0.0.1", port=free_port(), queue=1),
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


def test_drawing_fills_the_columns_in_turn_and_reports_the_steps(tmp_path):
    steps = []
    ask = events.make_ask(requests.make_respond(BOTH, max_chars=9, max_images=1), NAMES)
    answer = events.make_answer(ask, 2, tmp_path)
    first, second = answer(*VALUES, lambda done, *_, **__: steps.append(done))
    assert [len(shown[-1].columns) for shown in (first, second)] == [1, 2]
    assert "stale" in first[3].elem_classes and "stale" not in second[3].elem_classes
    assert steps == [(1, 1), *((done + 1, 25) for done in range(25))]


def test_the_slider_draws_with_one_model_while_it_moves_and_with_all_when_let_go_of(tmp_path):
    ask = events.make_ask(requests.make_respond(BOTH, max_chars=9, max_images=1), NAMES)
    answer, live = events.make_answer(ask, 2, tmp_path), events.make_live(ask, 2, tmp_path)
    settle = events.make_settle(answer, 2, NAMES.index("position"))
    heard, skipped = (lambda *_, **__: None), events.gradio.skip()
    assert list(settle(*VALUES, None, heard)) == [skipped]  # the Tab key went through the slider
    moved = [*VALUES[:5], 0.5, *VALUES[6:]]
    *_, passed, _ = live(*VALUES[:5], 0.2, *VALUES[6:], None, [])
    *_, drawn, _ = live(*moved, passed, [])
    assert len(drawn.columns) == 1 and drawn.there and not passed.there
    complete = list(settle(*moved, drawn, heard))[-1][-1]
    assert len(complete.columns) == 2 and complete.fields == tuple(moved)
    assert live(*moved, complete, []) == skipped and list(settle(*moved, complete, heard)) == [skipped]
    with pytest.raises(events.gradio.Error, match="the prompt is empty"):
        live("", *moved[1:], complete, [])
    live(*VALUES[:5], 0.7, *VALUES[6:], complete, [])
    assert complete.there


def test_a_thumbnail_brings_back_fields_and_images(tmp_path):
    ask = events.make_ask(requests.make_respond(BOTH, max_chars=9, max_images=1), NAMES)
    drawings = [
        list(events.make_answer(ask, 2, tmp_path)(*VALUES[:1], seed, *VALUES[2:], lambda *_, **__: None))[-1][-1]
        for seed in (1, 2)
    ]
    kept, thumbnails, *_ = events.keep(drawings[1], events.keep(drawings[0], [])[0])
    assert kept == drawings[::-1] and len(thumbnails.value) == 2
    back = events.bring_back(kept, events.gradio.SelectData(None, {"index": 1, "value": None}))
    assert back[: len(NAMES)] == ["cat", 1, *VALUES[2:]]
    assert back[len(NAMES)] == drawings[0].columns[0].line and drawings[0] in back


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the tests above use gradio's client")
def test_the_page_in_a_browser(page, teacher, tmp_path):
    """By keyboard and on a phone's width; enlarges without smoothing, and loads nothing from other servers."""
    with open_tab("--disable-gpu") as tab:
        requested = []
        tab.on("request", lambda request: requested.append(request.url))
        tab.set_viewport_size({"width": 400, "height": 800})
        tab.goto(page.local_url)
        prompt = tab.get_by_label("Prompt", exact=True)
        tab.wait_for_function("document.activeElement.tagName === 'TEXTAREA'")  # the page has filled its fields
        prompt.fill("red apple")
        tab.keyboard.press("Tab")
        draw = tab.get_by_role("button", name="Draw", exact=True)
        assert (
            draw.evaluate("button => button === document.activeElement && getComputedStyle(button).outlineWidth")
            == "3px"
        )
        prompt.press("Enter")
        tab.get_by_text("3 steps · ").wait_for()
        assert tab.get_by_text("one step · ").is_visible()
        drawn = tab.locator(".columns .images.small img")
        drawn.nth(1).wait_for()
        assert drawn.count() == 2
        style, width, shown = drawn.nth(0).evaluate(
            "p => [getComputedStyle(p).imageRendering, p.naturalWidth, p.getBoundingClientRect().width]"
        )
        assert (style, width) == ("pixelated", 4) and shown > 100
        assert tab.evaluate("document.documentElement.scrollWidth") == 400

        thumbnails = tab.locator(".session img")
        thumbnails.nth(0).wait_for()
        with tab.expect_download() as download:
            tab.get_by_text("Download").nth(1).click()
        assert download.value.suggested_filename == "red-apple_seed0_N3.png"
        with Image.open(download.value.path()) as file:
            assert (file.text["prompt"], file.text["alpha"], file.text["model"]) == ("red apple", "3", str(teacher))

        slider = tab.get_by_role("slider")
        slider.press("ArrowRight")
        thumbnails.nth(1).wait_for()  # drawn with all models, as after letting go of the slider with a mouse
        assert tab.locator(".stale").count() == 0 and slider.input_value() == "0.01"
        thumbnails.nth(1).click()
        tab.wait_for_function("document.querySelector('input[type=range]').value === '0'")

        prompt.fill("cat " * 50)
        draw.click()
        tab.get_by_text("the prompt has 50 tokens; use at most 14").wait_for()
        tab.screenshot(path=tmp_path / "page.png")
    foreign = [url for url in requested if not url.startswith((page.local_url, "data:", "blob:"))]
    assert requested and not foreign
