"""COCO in both its layouts, and the stage that measures a model on it: from files to the table, killed and resumed."""

import gc
import io
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tensorflow_datasets as tfds
import toy_training
from helpers import (
    COCO_COUNT,
    COCO_IDS,
    COCO_WORDS,
    ROOT,
    captions_of,
    drawn,
    jpeg,
    make_image_processor,
    read_config,
    small_inception,
)
from PIL import Image

from instaflow_jax import main
from instaflow_jax.data import coco, records
from instaflow_jax.evals import features
from instaflow_jax.infra import images
from instaflow_jax.models.inception import InceptionV3
from instaflow_jax.stages.common.paper import TABLES
from instaflow_jax.stages.evaluate_coco import job, measures, stage, table
from instaflow_jax.stages.evaluate_coco import rows as coco_rows
from instaflow_jax.weights.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The same photographs in the format of TFDS's own coco_captions, in two splits."""
    f = tfds.features
    root = tmp_path_factory.mktemp("tfds") / "coco_captions" / "2014" / "1.1.0"
    root.mkdir(parents=True)
    form = f.FeaturesDict(
        {
            "image": f.Image(encoding_format="jpeg"),
            "image/filename": f.Text(),
            "image/id": np.int64,
            "objects": f.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": f.BBoxFeature(),
                    "is_crowd": np.bool_,
                    "label": f.ClassLabel(num_classes=80),
                }
            ),
            "captions": f.Sequence({"text": np.str_, "id": np.int64}),
        }
    )

    def row(i: int) -> bytes:
        return form.serialize_example(
            {
                "image": io.BytesIO(jpeg(i)),
                "image/filename": f"{COCO_IDS[i]}.jpg",
                "image/id": COCO_IDS[i],
                "objects": [],
                "captions": [{"text": text, "id": k} for k, text in enumerate(captions_of(i))],
            }
        )

    splits = {}
    for name, rows in {"val": range(9), "restval": range(9, COCO_COUNT)}.items():
        path = root / f"coco_captions-{name}.array_record-00000-of-00001"
        records.write(path, map(row, rows))
        splits[name] = [(len(rows), path.stat().st_size)]
    records.write_metadata(
        root, "coco_captions", form, splits, version="1.1.0", description="", license="", homepage=""
    )
    return root


def official(coco_folder: Path) -> list[coco.Photo]:
    return coco.load(str(coco_folder / "val"), str(coco_folder / "annotations" / "captions_val.json"), "")


# ---------------------------------------------------------------- the data


def test_both_layouts_hold_the_same_photographs_with_their_first_captions(coco_folder, prepared):
    files, records_ = official(coco_folder), coco.load(f"tfds:{prepared}", "", "val+restval")
    assert [p.id for p in files] == [p.id for p in records_] == sorted(COCO_IDS)
    assert {p.id: p.caption for p in files} == {n: f"{COCO_WORDS[i % 4]} number {i}" for i, n in enumerate(COCO_IDS)}
    assert [p.caption for p in files] == [p.caption for p in records_]
    for a, b in zip(files, records_, strict=True):
        np.testing.assert_array_equal(coco.pixels(a, 16), coco.pixels(b, 16))
    coco.check_present(files)
    coco.check_present(records_)
    assert len(coco.load(f"tfds:{prepared.parents[2]}", "", "val")) == 9
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("width,height", [(64, 48), (48, 64), (30, 97), (16, 16), (9, 7)])
def test_a_photograph_is_resized_by_lanczos_and_cut_from_the_middle(width, height):
    # Resampling keeps a ramp: a crop off the middle shows in its mean, a wrong scale in its slope.
    ramp = np.add.outer(np.linspace(0, 100, height), np.linspace(0, 155, width))
    pixels = np.repeat(np.rint(ramp)[:, :, None], 3, 2).astype(np.uint8)
    got = images.cover(Image.fromarray(pixels), 16, 16)
    assert got.shape == (16, 16, 3) and got.dtype == np.uint8
    assert abs(got.mean() - pixels.mean()) < 0.5 * 155 / 16 + 1  # an odd margin cannot be halved
    slope = 155 / (width * 16 / min(width, height))  # the full width's, so that both sides are scaled alike
    assert np.diff(got[8, 3:-3, 0].astype(float)).mean() == pytest.approx(slope, rel=0.15)
    if (width, height) == (64, 48):
        want = np.asarray(Image.fromarray(pixels).resize((21, 16), Image.Resampling.LANCZOS))[:, 2:18]
        np.testing.assert_array_equal(got, want)
    if width == height:
        np.testing.assert_array_equal(got, pixels)


def test_everybody_gets_the_same_captions(coco_folder):
    photos = official(coco_folder)
    some = coco.choose(photos, 6)
    assert [p.id for p in some] == [p.id for p in coco.choose(photos, 6)] == sorted(p.id for p in some)
    assert {p.id for p in some} <= {p.id for p in coco.choose(photos, 9)} and some != photos[:6]
    assert coco.choose(photos, COCO_COUNT) == photos
    with pytest.raises(ValueError, match="15 captions were asked for, but there are only 14 photographs"):
        coco.choose(photos, 15)


@pytest.mark.parametrize(
    "content,words",
    [
        ({"images": []}, "no 'annotations' where it should be"),
        ([1, 2], "contains a JSON list"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]}, "no 'caption'"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, "no caption of a.jpg, nor of 0 more of 1"),
        ({"images": [], "annotations": []}, "holds no photographs"),
    ],
)
def test_a_file_that_is_not_of_captions_is_named(content, words, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        coco.load(str(tmp_path), str(path), "")


@pytest.mark.parametrize(
    "fields,error,words",
    [
        ({"source": "nowhere"}, FileNotFoundError, "nowhere is missing: .*val2017.zip.*cocodataset.org"),
        ({"captions": "nowhere.json"}, FileNotFoundError, "nowhere.json is missing"),
        ({"split": "val"}, ValueError, "has no splits"),
        ({"captions": ""}, ValueError, "needs a file of captions"),
        ({"source": "tfds:nowhere", "captions": "", "split": "val"}, FileNotFoundError, "array_record"),
        ({"source": "tfds:SET", "captions": "", "split": "val+test"}, ValueError, "no split 'test'; it has"),
        ({"source": "tfds:SET", "split": "val"}, ValueError, "has its captions in itself"),
    ],
)
def test_a_missing_source_says_where_to_download_it(fields, error, words, coco_folder, prepared):
    right = {
        "source": str(coco_folder / "val"),
        "captions": str(coco_folder / "annotations" / "captions_val.json"),
        "split": "",
    }
    fields = {name: value.replace("SET", str(prepared)) for name, value in fields.items()}
    with pytest.raises(error, match=words):
        coco.load(**right | fields)


# ---------------------------------------------------------------- the stage


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(features, "load_inception", small_inception)
    monkeypatch.setattr(measures, "sha256_of_params", lambda weights: "of the six numbers")


def config(coco_folder, coco_models, **fields):
    config = read_config("evaluate_coco")
    (coco_models / "inception.pth").touch()
    config.update(
        {
            "model": str(coco_models / "sd"),
            "clip": str(coco_models / "clip"),
            "size": 16,
            "batch": 4,
            "repeats": 1,
            "inception": str(coco_models / "inception.pth"),
        }
    )
    config.data.update(
        {
            "source": str(coco_folder / "val"),
            "captions": str(coco_folder / "annotations" / "captions_val.json"),
            "count": COCO_COUNT,
        }
        | fields.pop("data", {})
    )
    config.update(fields)
    return config


def results(workdir: Path, row: str = "") -> dict:
    """The numbers of the first row, or of that in the folder `row`, without the seconds, which vary."""
    found = json.loads((workdir / "evaluate" / "coco" / row / "results.json").read_text())["results"]
    assert found.pop("seconds") > 0
    return found


def drawn_images(workdir: Path, row: str = "") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (workdir / "evaluate" / "coco" / row / "pictures").iterdir()}


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory, fast_compilation):
    """Runs share their compiled programs."""
    with toy_training.compile_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def done(coco_folder, coco_models, tmp_path_factory, compile_once):
    """A complete run."""
    workdir = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "load_inception", small_inception)
        patch.setattr(measures, "sha256_of_params", lambda weights: "of the six numbers")
        main.run(config(coco_folder, coco_models), str(workdir))
    return workdir


@pytest.mark.slow
def test_the_numbers_are_those_of_the_files_it_wrote(done, coco_folder, torch):
    from pytorch_fid.fid_score import calculate_frechet_distance

    weights = small_inception(__file__)[1].reshape(-1, 6)
    made = sorted((done / "evaluate" / "coco" / "pictures").iterdir())
    assert [path.name for path in made] == [f"{number:012d}.png" for number in sorted(COCO_IDS)]
    sets = [
        [np.asarray(Image.open(path)) for path in made],
        [coco.pixels(photo, 16) for photo in official(coco_folder)],
    ]
    rows = [(np.stack(s)[:, ::4, ::4] / 255).reshape(COCO_COUNT, -1) @ weights for s in sets]
    statistics = [part for x in rows for part in (x.mean(0), np.cov(x, rowvar=False))]
    found = results(done)
    assert found["fid"] == pytest.approx(calculate_frechet_distance(*statistics), rel=1e-4)  # features in float32
    assert found["made"] == found["real"] == COCO_COUNT and 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1
    assert -1 <= found["clip_score"] <= 1 and found["clip_score_error"] > 0 and found["kid_deviation"] >= 0
    text = (done / "evaluate" / "coco" / "results.md").read_text()
    assert f"{found['fid']:.2f}" in text and f"{found['clip_score']:.4f}" in text and "16×16 pixels" in text
    _, notes = images.load_png(made[0])
    assert notes["prompt"] == official(coco_folder)[0].caption


@pytest.mark.slow
def test_clip_score_pairs_each_image_with_its_caption(done, coco_folder, coco_models):
    """By transformers' own classes, from the files."""
    import torch
    from transformers import CLIPModel as Theirs

    net = Theirs.from_pretrained(coco_models / "clip")
    processor = make_image_processor(do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    photos = official(coco_folder)
    made = [Image.open(done / "evaluate" / "coco" / "pictures" / f"{photo.id:012d}.png") for photo in photos]
    ids = Tokenizer.from_pretrained(coco_models / "clip", "")([photo.caption for photo in photos])
    with torch.no_grad():
        out = net(input_ids=torch.tensor(ids), **processor(made, return_tensors="pt"))
    want = (out.image_embeds * out.text_embeds).sum(-1).mean().item()
    assert results(done)["clip_score"] == pytest.approx(want, abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_result_in_either_layout(
    done, coco_folder, prepared, coco_models, small, tmp_path, monkeypatch
):
    settings = config(
        coco_folder, coco_models, data={"source": f"tfds:{prepared}", "captions": "", "split": "val+restval"}
    )
    save, written = images.save_png, []

    def dying(path, *rest):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(path)
        save(path, *rest)

    monkeypatch.setattr(images, "save_png", dying)
    with pytest.raises(KeyboardInterrupt):
        main.run(settings, str(tmp_path))
    assert len(drawn_images(tmp_path)) == 6 and not (tmp_path / "evaluate" / "coco" / "results.json").exists()
    monkeypatch.setattr(images, "save_png", lambda path, *rest: (written.append(path), save(path, *rest)))
    monkeypatch.setattr(coco, "pixels", None)  # photographs are not read again
    main.run(settings, str(tmp_path))
    assert len(written) == len(set(written)) == COCO_COUNT
    assert drawn_images(tmp_path) == drawn_images(done) and results(tmp_path) == results(done)


def test_images_are_reduced_as_photographs_are(coco_models, tmp_path):
    photo = coco.Photo(7, "red apple", "", lambda: True, bytes)
    options = coco_rows.read_options(config(tmp_path, coco_models, size=8))
    image = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)
    job.write(job.Job(options, None, [photo], None, None, {}, tmp_path), [photo], image[None])
    got, _ = images.load_png(tmp_path / "pictures" / "000000000007.png")
    np.testing.assert_array_equal(got, images.cover(Image.fromarray(image), 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields,error,words",
    [
        ({"data": {"count": 15}}, ValueError, "15 captions were asked for, but there are only 14"),
        ({"data": {"count": 3}}, ValueError, "config.data.count=3 must be at least 4"),
        ({"data": {"source": "nowhere"}}, FileNotFoundError, "nowhere is missing"),
        ({"size": 20}, ValueError, "config.size=20 exceeds the images of .*, 16×16"),
        ({"height": 17}, ValueError, "config.height=17 is not divisible"),
        (
            {"inception": "nowhere.pth"},
            FileNotFoundError,
            "nowhere.pth is missing: the FID needs pytorch-fid's weights",
        ),
        ({"clip": "nowhere"}, FileNotFoundError, "'nowhere' is neither a directory nor a hub id"),
        ({"model": "nowhere"}, FileNotFoundError, "'nowhere' is neither a directory nor a hub id"),
        ({"reference": "nowhere.npz"}, FileNotFoundError, "nowhere.npz is missing"),
        ({"reference": "WRONG"}, ValueError, "of features of 5 numbers, but .*inception.pth gives 6"),
        ({"batch": 0}, ValueError, "config.batch=0"),
        ({"N": 0}, ValueError, "N=0"),
        ({"negative": "a face"}, ValueError, "guidance needs alpha > 1"),
        ({"extra": "nowhere,N=2"}, FileNotFoundError, "'nowhere' is neither a directory nor a hub id"),
        ({"extra": "SD,solver=heun,dynamics=teacher"}, ValueError, "sd_N1_alpha1_heun: .* does not fit a teacher"),
    ],
)
def test_what_cannot_be_measured_ends_before_anything_is_written(
    fields, error, words, coco_folder, coco_models, small, tmp_path
):
    if fields.get("reference") == "WRONG":
        np.savez(tmp_path / "wrong.npz", mu=np.zeros(5), sigma=np.eye(5))
        fields = {"reference": str(tmp_path / "wrong.npz")}
    if "extra" in fields:
        fields = {"extra": fields["extra"].replace("SD", str(coco_models / "sd"))}
    with pytest.raises(error, match=words):
        main.run(config(coco_folder, coco_models, **fields), str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm,error,words",
    [
        (lambda path: path.unlink(), FileNotFoundError, "is missing, as are 0 more of 14 photographs; download"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), ValueError, "cannot be read as an image"),
        (lambda path: path.write_text("not found"), ValueError, "cannot be read as an image"),
    ],
)
def test_a_missing_or_damaged_photograph_is_named_before_anything_is_written(
    harm, error, words, coco_folder, coco_models, small, tmp_path
):
    copy = shutil.copytree(coco_folder, tmp_path / "coco")
    path = copy / "val" / f"{COCO_IDS[3]:012d}.jpg"
    harm(path)
    with pytest.raises(error, match=words) as raised:
        main.run(config(copy, coco_models), str(tmp_path / "work"))
    assert str(path) in str(raised.value) and not (tmp_path / "work").exists()


@pytest.mark.slow
def test_images_of_another_recipe_are_refused_and_missing_ones_made_again(
    done, coco_folder, coco_models, small, tmp_path
):
    workdir = Path(shutil.copytree(done, tmp_path / "work"))
    for fields, words in (
        ({"N": 2}, r"another recipe \(N differs\)"),
        ({"size": 8, "seed": 1}, r"\(seed, size differ\)"),
    ):
        with pytest.raises(ValueError, match=words):
            main.run(config(coco_folder, coco_models, **fields), str(workdir))
    path = workdir / "evaluate" / "coco" / "pictures" / f"{COCO_IDS[0]:012d}.png"
    for harm, words in (
        (lambda: Image.new("RGB", (9, 7)).save(path), "has 9×7 pixels, not 16×16; delete it"),
        (lambda: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "is not readable .*delete it"),
    ):
        harm()
        with pytest.raises(ValueError, match=words):
            main.run(config(coco_folder, coco_models), str(workdir))
    path.unlink()
    (tmp_path / "no photographs").mkdir()
    main.run(
        config(
            coco_folder,
            coco_models,
            data={"source": str(tmp_path / "no photographs")},
            reference=str(done / "evaluate" / "coco" / "reference.npz"),
        ),
        str(workdir),
    )
    got, want = results(workdir), results(done)
    assert drawn_images(workdir) == drawn_images(done) and got["kid"] is None
    assert "| – |" in (path.parents[1] / "results.md").read_text()
    assert got["fid"] == want["fid"] and got["clip_score"] == want["clip_score"]


@pytest.mark.slow
def test_the_command_on_two_devices_with_the_real_inception(done, coco_folder, coco_models, tmp_path):
    """Random weights; the images are those of one device."""
    net = InceptionV3.from_config({})
    net.save_pretrained(drawn(net), tmp_path / "inception", dtype=np.float32)
    settings = {
        "model": coco_models / "sd",
        "clip": coco_models / "clip",
        "size": 16,
        "batch": 4,
        "inception": tmp_path / "inception" / "model.safetensors",
        "data.source": coco_folder / "val",
        "data.captions": coco_folder / "annotations" / "captions_val.json",
        "data.count": 6,
    }
    command = [
        sys.executable,
        "-m",
        "instaflow_jax.main",
        "--config=configs/evaluate_coco.py:coco5k",
        f"--workdir={tmp_path}",
        "--cpu_devices=2",
        *(f"--config.{k}={v}" for k, v in settings.items()),
    ]
    ran = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "| FID |" in ran.stdout and "batches of 8 images" in ran.stdout
    for name in drawn_images(tmp_path):
        one, two = (Image.open(root / "evaluate" / "coco" / "pictures" / name) for root in (done, tmp_path))
        assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 1
    found = results(tmp_path)
    assert np.isfinite(found["fid"]) and found["fid"] > 0 and (found["made"], found["real"]) == (6, COCO_COUNT)
    assert np.load(tmp_path / "evaluate" / "coco" / "reference.npz")["mu"].shape == (2048,)


@pytest.mark.slow
def test_an_image_that_is_not_finite_is_neither_written_nor_measured(coco_folder, coco_models, small, tmp_path):
    """Finite weights whose product is too large for float32."""
    model = shutil.copytree(coco_models / "sd", tmp_path / "sd")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    tensors["decoder.conv_in.bias"] = np.full_like(tensors["decoder.conv_in.bias"], 3e38)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"the image of prompt '.*', seed 0, image \d+ is NaN or infinite"):
        main.run(config(coco_folder, coco_models, model=str(model)), str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/**/*.png")) and not list(tmp_path.glob("out/**/results.json"))


# ---------------------------------------------------------------- several rows, and the paper's tables


@pytest.mark.parametrize(
    "extra,words",
    [
        ("a/b|", "'': write MODEL, or MODEL,N=25,alpha=1.5"),
        ("N=4,a/b", "'N=4,a/b': write MODEL"),
        ("a/b,size=4", "'size=4' is not one of N=…, alpha=…, solver=…, dynamics=…"),
        ("a/b,25", "'25' is not one of N="),
        ("a/b,N=1,N=2", "'N=2' is not one of .* each at most once"),
        ("a/b,N=two", "'N=two' is not like N=25"),
        ("a/b,N=0", "config.N=0 must be at least 1"),
        ("a/b,alpha=nan", "config.alpha=nan is not a finite number"),
        ("a/b,solver=rk4", "'solver=rk4' is not one of auto, euler, heun, dpm_solver, ddim"),
        ("a/b,dynamics=ode", "'dynamics=ode' is not one of auto, flow, teacher"),
        ("SD,N=1", "the table has this row already"),
        ("a/b,N=4|a/b,alpha=1,N=4", "the table has this row already"),
        ("a/b,N=4|c/A/b/export,N=4", "another row has the folder A_b_N4_alpha1 too"),
    ],
)
def test_a_malformed_extra_is_one_line_before_anything_is_read(extra, words, coco_folder, coco_models, tmp_path):
    settings = config(coco_folder, coco_models, extra=extra.replace("SD", str(coco_models / "sd")), clip="nowhere")
    with pytest.raises(ValueError, match=words) as raised:
        main.run(settings, str(tmp_path / "work"))
    assert str(raised.value).startswith("config.extra='") and "\n" not in str(raised.value)
    assert not (tmp_path / "work").exists()


def test_an_extra_row_changes_only_what_it_says(coco_folder, coco_models):
    """The LoRA files and the delta are those of the first row."""
    settings = config(coco_folder, coco_models, extra="x, N=4, dynamics=teacher|y/export,alpha=2.5", loras="FILE=0.5")
    settings.delta.custom = "another"
    first, *others = coco_rows.read(settings)
    assert first == coco_rows.read_options(settings) and first.weights.loras == (("FILE", 0.5),) and first.weights.delta
    assert [row.model for row in others] == ["x", "y/export"]
    assert [(row.solving.N, row.solving.alpha, row.solving.dynamics) for row in others] == [
        (4, 1.0, "teacher"),
        (1, 2.5, "flow"),
    ]
    assert all(row.weights.loras == () and row.weights.delta is None and row.size == first.size for row in others)
    assert [coco_rows.folder(row) for row in others] == ["x_N4_alpha1", "y_N1_alpha2.5"]


@pytest.mark.slow
def test_rows_share_references_and_give_what_each_gives_alone_also_when_killed(
    done, coco_folder, coco_models, small, tmp_path, monkeypatch
):
    """A run that is killed while it draws its second row, and continued."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    main.run(config(coco_folder, coco_models, N=2), str(alone))
    model = coco_models / "sd"
    settings = config(coco_folder, coco_models, extra=f"{model},N=2")
    row = f"{coco_models.name}_sd_N2_alpha1"
    save, load, pixels, written, photos = images.save_png, job.load, coco.pixels, [], []

    def dying(path, *rest):
        if len(written) == COCO_COUNT + 5:
            raise KeyboardInterrupt
        written.append(path)
        save(path, *rest)

    monkeypatch.setattr(images, "save_png", dying)
    monkeypatch.setattr(coco, "pixels", lambda photo, size: photos.append(photo.id) or pixels(photo, size))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "measure_model", lambda *_, **__: {})  # measured again below
        patch.setattr(measures, "measure", lambda *_: {})
        with pytest.raises(KeyboardInterrupt):
            main.run(settings, str(both))
    assert sorted(photos) == sorted(COCO_IDS) and len(drawn_images(both, row)) == 5
    assert not (both / "evaluate" / "coco" / "results.md").exists()

    loaded = []
    # pytest keeps what a finalizer raises, and with it the frames that were running, whose variables hold models.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)

    def load_alone(*arguments):
        gc.collect()
        assert all(pipe() is None for pipe in loaded), "two models are in memory"
        pipe = load(*arguments)
        loaded.append(weakref.ref(pipe))
        return pipe

    monkeypatch.setattr(images, "save_png", lambda path, *rest: (written.append(path), save(path, *rest)))
    monkeypatch.setattr(coco, "pixels", None)  # photographs are not read again
    monkeypatch.setattr(job, "load", load_alone)
    main.run(settings, str(both))
    assert len(loaded) == 3 and len(written) == len(set(written)) == 2 * COCO_COUNT
    assert results(both) == results(done) and drawn_images(both) == drawn_images(done)
    assert results(both, row) == results(alone) and drawn_images(both, row) == drawn_images(alone)
    assert results(both) != results(both, row)
    text = (both / "evaluate" / "coco" / "results.md").read_text()
    assert text.count(f"| {model} | 1 |") == text.count(f"| {model} | 2 |") == 2  # in both tables
    assert "| Stable Diffusion 1.5 | 25 | 0.88 | 20.1 | 0.318 | paper, A100 |" in text

    recipe = both / "evaluate" / "coco" / row / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"N": 2', '"N": 3'))
    with pytest.raises(ValueError, match=rf"config.extra, {row}: .*{row} holds images of another recipe \(N differs\)"):
        main.run(settings, str(both))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_papers_table_stands_above_ours(number):
    row = {"model": "DIR", "N": 1, "alpha": 1.5, "seconds": 0.0912, "fid": 24.04, "clip_score": 0.2999, "made": 5000}
    row |= {"S": 0.01, "S_error": 0.001, "clip_score_error": 0.0004, "real": 5000}
    row |= dict.fromkeys(("kid", "kid_deviation", "precision", "recall"))
    text = table.page("COCO", [row, row | {"N": 4}], number, "a TPU")
    assert text.count("| DIR | ") == 2 and "| 0.091 | 0.0100 ± 0.0010 | 24.04 | 0.2999 ± 0.0004 | – | – |" in text
    lines = [line for line in text.splitlines() if line.endswith("| paper, A100 |")]
    assert len(lines) == (len(TABLES[number].figures) if number else 0)
    assert text.count("| DIR, α = 1.5 | 1 | 0.09 | 24.0 | 0.300 | a TPU |") == bool(number)
    if number == 2:
        assert "| InstaFlow-0.9B | 1 | – | 13.1 | – | paper, A100 |" in lines
