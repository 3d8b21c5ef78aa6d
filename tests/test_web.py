"""The formats `onnx` and `web` of stage `export`: ONNX Runtime, here and in headless Chromium, draws our images."""

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from helpers import (
    FAST_ONLY_PROMPTS,
    LEARNED_PROMPTS,
    PLAIN_PROMPTS,
    TOKENIZER,
    make_tiny,
    need_jax2onnx,
    normal,
    onnxruntime_web,
    read_config,
)

from instaflow_jax import main, sampling
from instaflow_jax.stages.common.loading import WeightOptions
from instaflow_jax.stages.export import onnx, program, web
from instaflow_jax.stages.export import source as export_source
from instaflow_jax.weights.tokenizer import Tokenizer
from tools.measure_web import CHROMIUM, draw, open_tab, pixels, serve, wait_until_ready

PROMPTS = ["red apple", "cat face", "a house"]
ODD_PROMPTS = [*PLAIN_PROMPTS, *FAST_ONLY_PROMPTS, *LEARNED_PROMPTS, "cat " * 20, "x" * 60]
ODD_PROMPTS += [
    "\u0085x\u00a0y\u3000z\ufeffw\u200bv",
    "İstanbul ß",
    "e\u0301 vs é",
    "½ ² Ⅷ ٣٤",
    "''s 's' don't've",
    "\x00\x7f",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Stable Diffusion of random weights and 32×32 pixels."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def flow(tiny):
    return export_source.load(str(tiny), "ema", "flow", WeightOptions())


@pytest.fixture(scope="module")
def ours(flow):
    """(ids, noise) → the one-step images of this package, integers from 0 to 255."""
    generate, weights = jax.jit(program.make_one_step(flow)), program.flat(flow.pipe)
    return lambda ids, noise: np.asarray(generate(weights, ids, noise), int)


def configured(model, **fields):
    config = read_config("export")
    config.update({"model": str(model), "dynamics": "flow", "formats": ("web",), "prompts": "red apple|house"} | fields)
    return config


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """The folder of an export in both formats."""
    need_jax2onnx()
    workdir = tmp_path_factory.mktemp("out")
    package = onnxruntime_web()
    main.run(configured(tiny, formats=("onnx", "web"), onnxruntime_web=str(package)), str(workdir))
    return workdir / "export"


# ---------------------------------------------------------------- onnxruntime on this machine


@pytest.mark.slow
def test_the_code_in_the_card_draws_our_images_in_any_batch(exported, ours, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(exported)
    code = (exported / "README.md").read_text().split("`onnx/`:")[1].split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    ids = np.array([row.ids for row in names["rows"]], np.int32)
    want = ours(ids, names["noise"])
    difference = np.abs(names["images"].astype(int) - want)
    print(
        f"onnxruntime, float32: largest difference {difference.max()} of 255 levels in {difference.mean():.1e} of them"
    )
    assert names["images"].shape == (2, 32, 32, 3) and want.std() > 10
    assert difference.max() <= 1 and difference.mean() < 1e-3
    alone = names["session"].run(None, {"ids": ids[1:], "noise": names["noise"][1:]})[0]
    assert np.abs(alone.astype(int) - want[1:]).max() <= 1


@pytest.mark.slow
def test_the_weights_of_onnx_are_beside_the_graph_and_those_of_web_inside_in_half_the_bytes(exported, flow):
    weights = program.flat(flow.pipe)
    whole = sum(array.nbytes for array in weights.values())
    graph, beside, page = (
        (exported / name).stat().st_size
        for name in ("onnx/one_step.onnx", "onnx/one_step.onnx.data", "web/one_step.onnx")
    )
    assert whole * 0.9 < beside < whole * 1.2
    half = sum(array.nbytes for array in onnx.stored(flow.pipe, half=True).values())
    assert half < 0.6 * whole and page < half + graph


# ---------------------------------------------------------------- refused before anything is written


@pytest.fixture
def converter(monkeypatch):
    """Stands in for jax2onnx, which these tests do not reach."""
    monkeypatch.setitem(sys.modules, "jax2onnx", types.SimpleNamespace(to_onnx=lambda *_, **__: None))


@pytest.mark.parametrize(
    "fields,words",
    [
        ({}, r"config\.onnxruntime_web='' must be the unpacked npm package .*: run npm pack onnxruntime-web@"),
        ({"onnxruntime_web": "nowhere"}, r"config\.onnxruntime_web='nowhere' must be the unpacked npm package"),
        ({"dynamics": "auto"}, "is a teacher, but the format 'web' is the one-step program"),
        ({"dynamics": "auto", "formats": ("onnx",)}, "is a teacher, but the format 'onnx' is the one-step program"),
    ],
)
def test_wrong_settings_raise_one_clear_message(fields, words, tiny, converter, tmp_path):
    with pytest.raises(ValueError, match=words):
        main.run(configured(tiny, **fields), str(tmp_path))
    assert not (tmp_path / "export").exists()


@pytest.fixture
def package(tmp_path):
    """A folder with the files of ONNX Runtime Web, empty."""
    (tmp_path / "dist").mkdir()
    for name in web.ort_names():
        (tmp_path / "dist" / name).touch()
    return str(tmp_path)


def test_a_model_too_large_for_a_browser_is_refused(flow, package, monkeypatch):
    size = sum(array.nbytes for array in onnx.stored(flow.pipe, half=True).values())
    monkeypatch.setattr(web, "LARGEST", size)
    web.check(flow, package)
    monkeypatch.setattr(web, "LARGEST", size - 1)
    with pytest.raises(ValueError, match=r"of weights in float16, too many for a browser, which takes .*B: use"):
        web.check(flow, package)


def test_float16_that_overflows_is_refused(flow, package):
    weights = flow.pipe.params["unet"] | {"conv_in.kernel": 1e6 * flow.pipe.params["unet"]["conv_in.kernel"]}
    large = dataclasses.replace(flow, pipe=export_source.replace_unet(flow.pipe, weights))
    with pytest.raises(ValueError, match=r"weight unet/conv_in\.kernel has values up to .* but float16 ends at 65504"):
        web.check(large, package)


@pytest.mark.parametrize("name", ["onnx", "web"])
def test_a_missing_jax2onnx_ends_in_one_line_that_names_the_extra(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ValueError, match=r"'export' needs the package 'jax2onnx'.* use pip install -e '\.\[onnx\]'"):
        main.run(configured(tiny, formats=(name,)), str(tmp_path))
    assert not (tmp_path / "export").exists()


def test_a_jax_that_jax2onnx_does_not_know_ends_in_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", types.ModuleType("jax2onnx"))  # lacks to_onnx
    monkeypatch.setattr(onnx.importlib.metadata, "version", lambda name: "0.17.1")
    with pytest.raises(
        ValueError, match=rf"jax2onnx 0\.17\.1 does not work with jax {jax.__version__} \(.*to_onnx.*\)"
    ):
        main.run(configured(tiny, formats=("onnx",)), str(tmp_path))
    assert not (tmp_path / "export").exists()


def test_markdown_of_a_licence_becomes_html():
    text = web.to_html("[CC <1>](https://a.org/b) & <b>")
    assert text == '<a href="https://a.org/b">CC &lt;1&gt;</a> &amp; &lt;b&gt;'
    assert json.loads(web.to_script({"a": "</script>"})) == {"a": "</script>"} and "</" not in web.to_script(
        "</script>"
    )


# ---------------------------------------------------------------- the page in a browser


@pytest.fixture(scope="module")
def tab(exported):
    """The page in headless Chromium, ready to draw; `requested` lists what it loaded, and `home` is its address."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with serve(exported / "web") as url, open_tab("--disable-gpu") as tab:
        tab.requested, tab.home = [], url
        tab.on("request", lambda request: tab.requested.append(request.url))
        tab.goto(url)
        assert wait_until_ready(tab) == "Ready (WASM, 1 thread)."  # without a GPU or cross-origin isolation
        yield tab


@pytest.mark.slow
def test_the_page_draws_our_image_of_given_noise(tab, flow, ours):
    noise, ids = normal(0, 1, *flow.pipe.latent_shape), flow.pipe.tokenizer(PROMPTS[:1])
    program = """async ([ids, noise]) => {
        const { run } = await (await import("./draw.js")).ready;
        return [...(await run(Int32Array.from(ids), Float32Array.from(noise))).data];
    }"""
    got = np.array(tab.evaluate(program, [ids[0].tolist(), noise.ravel().tolist()])).reshape(32, 32, 4)
    want = ours(ids, noise)[0]
    print(f"Chromium, float16 weights: largest difference {np.abs(got[..., :3] - want).max()} of 255 levels")
    assert np.abs(got[..., :3] - want).max() <= 1 and want.std() > 10 and np.all(got[..., 3] == 255)


@pytest.mark.slow
def test_the_page_has_our_tokenizer(tab, tmp_path):
    """SD 1.x's padding, and SD 2.x's with two learned words."""
    for pad in ("", "!"):
        folder = Path(shutil.copytree(TOKENIZER, tmp_path / f"padding{pad}" / "tokenizer"))
        if pad:
            for name in ("tokenizer_config.json", "special_tokens_map.json"):
                config = json.loads((folder / name).read_text())
                (folder / name).write_text(json.dumps(config | {"pad_token": pad}))
            (folder / "added_tokens.json").write_text('{"<cat-toy>": 2048, "blorp": 2049}')
        tokenizer = Tokenizer.from_pretrained(folder.parent)
        rows = tab.evaluate(
            """async ([file, prompts]) => {
                const encode = (await import("./draw.js")).makeTokenizer(JSON.parse(file));
                return prompts.map(encode).map(({ row, count }) => [[...row], count]);
            }""",
            [tokenizer.to_json(), ODD_PROMPTS],
        )
        alone = tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode_batch(ODD_PROMPTS)
        for prompt, (row, count), want in zip(ODD_PROMPTS, rows, alone, strict=True):
            assert (row, count) == (want.ids, tokenizer.count(prompt)), prompt


@pytest.mark.slow
def test_a_seed_gives_our_noise(tab):
    seeds, shape = np.array([0, 7, 2**32 - 1], np.uint32), (4, 4, 4)
    program = (
        'async (seeds) => { const { noise } = await import("./draw.js"); return seeds.map((s) => [...noise(s, 64)]) }'
    )
    got = np.array(tab.evaluate(program, seeds.tolist()))
    np.testing.assert_allclose(got, np.asarray(sampling.noise(seeds, shape)).reshape(3, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
def test_a_visitor_draws_and_is_told_what_is_wrong(width, tab, flow, ours, tmp_path):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.get_by_label("Prompt").fill("cat face")
    assert draw(tab, 5) > 0
    want = ours(flow.pipe.tokenizer(["cat face"]), np.asarray(sampling.noise(np.uint32([5]), flow.pipe.latent_shape)))[
        0
    ]
    assert np.abs(pixels(tab).astype(int) - want).max() <= 1
    style, shown = tab.locator("#image").evaluate("p => [getComputedStyle(p).imageRendering, p.clientWidth]")
    assert style == "pixelated" and shown > 300 and tab.locator("#progress").is_hidden()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    for label, text, words in (
        ("Prompt", "cat " * 50, "the prompt has 50 tokens; use at most 14"),
        ("Prompt", "  ", "the prompt is empty; write what to draw"),
    ):
        tab.get_by_label(label).fill(text)
        tab.get_by_role("button", name="Draw", exact=True).click()
        tab.get_by_text(words).wait_for()


@pytest.mark.slow
def test_the_page_loads_nothing_from_elsewhere_and_credits_its_parts(tab, exported):
    assert tab.requested and all(url.startswith(tab.home) for url in tab.requested)
    assert tab.get_by_role("link", name="MIT licence").is_visible()
    assert "Permission is hereby granted" in (exported / "web" / "onnxruntime" / "LICENSE").read_text()
    assert tab.get_by_text("Licence of the model and its images:").is_visible()
