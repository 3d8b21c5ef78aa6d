"""COCO in both its layouts, and the stage that measures a model on it: from files to the table, killed and resumed."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tensorflow_datasets as tfds
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
from instaflow_jax.stages.evaluate_coco import measures
from instaflow_jax.stages.evaluate_coco import stage as evaluate_coco
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
    got = coco.square(Image.fromarray(pixels), 16)
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


def results(workdir: Path) -> dict:
    return json.loads((workdir / "evaluate" / "coco" / "results.json").read_text())["results"]


def drawn_images(workdir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (workdir / "evaluate" / "coco" / "pictures").iterdir()}


@pytest.fixture(scope="module")
def done(coco_folder, coco_models, tmp_path_factory):
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
    options = evaluate_coco.read_options(config(tmp_path, coco_models, size=8))
    job = evaluate_coco.Job(options, None, [photo], None, {}, tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)
    evaluate_coco.write(job, [photo], image[None])
    got, _ = images.load_png(tmp_path / "pictures" / "000000000007.png")
    np.testing.assert_array_equal(got, coco.square(Image.fromarray(image), 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields,error,words",
    [
        ({"data": {"count": 15}}, ValueError, "15 captions were asked for, but there are only 14"),
        ({"data": {"count": 3}}, ValueError, "config.data.count=3 must be at least 4"),
        ({"data": {"source": "nowhere"}}, FileNotFoundError, "nowhere is missing"),
        ({"size": 20}, ValueError, "config.size=20 exceeds the model's images of 16×16"),
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
    ],
)
def test_what_cannot_be_measured_ends_before_anything_is_written(
    fields, error, words, coco_folder, coco_models, small, tmp_path
):
    if fields.get("reference") == "WRONG":
        np.savez(tmp_path / "wrong.npz", mu=np.zeros(5), sigma=np.eye(5))
        fields = {"reference": str(tmp_path / "wrong.npz")}
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
