"""Real images with captions: reading them, encoding them once, batches with them, and the stages that train on them."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
import toy_training as toy
from helpers import ROOT, killed_at, load, normal, refine_config, reflow_config, relative
from PIL import Image

from instaflow_jax import flow, main, pipeline
from instaflow_jax.data import records
from instaflow_jax.data.noise import noise
from instaflow_jax.data.pairs.reader import PairBatches, Pairs, Shards
from instaflow_jax.data.real_images import sources
from instaflow_jax.data.real_images.batches import BatchesBesideImages, MixedBatches, Share
from instaflow_jax.infra import devices, images
from instaflow_jax.infra.checkpoint import Checkpoints
from instaflow_jax.stages import refine
from instaflow_jax.stages.common import flow_training, real_images
from instaflow_jax.stages.common.loading import WeightOptions
from instaflow_jax.stages.generate.stage import need_pairs
from instaflow_jax.train import losses, score_distillation
from instaflow_jax.train import state as train_state
from instaflow_jax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("only_training")
COUNT = 11
SIZES = [(6, 6), (9, 5), (5, 12), (4, 4)]


def image_of(i: int) -> Image.Image:
    height, width = SIZES[i % len(SIZES)]
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8))


def make_folder(folder, count=COUNT):
    """NAME.png in two folders with captions beside them."""
    (folder / "more").mkdir(parents=True)
    for i in range(count):
        path = folder / ("more" if i % 2 else "") / f"{i:02d}.png"
        image_of(i).save(path)
        path.with_suffix(".txt").write_text(f"red  apple\nnumber {i}\n")
    (folder / "README.txt").write_text("not a caption of any image")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with toy.compile_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "folder")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def listed(source, column="text", split="train"):
    return sources.load(str(source), column, split)


# ---------------------------------------------------------------- reading them


def write_metadata(copy):
    """The same captions in metadata.jsonl."""
    rows = []
    for image in listed(copy):
        rows.append(json.dumps({"file_name": image.name, "words": {"en": [image.caption, "another"]}}))
        (copy / image.name).with_suffix(".txt").unlink()
    (copy / "metadata.jsonl").write_text("\n".join(rows) + "\n\n")


def prepare_tfds(root, found):
    """The same images as a TFDS set."""
    form = tfds.features.FeaturesDict({"picture": tfds.features.Image(), "words": {"en": tfds.features.Text()}})
    rows = [form.serialize_example({"picture": io.BytesIO(i.read()), "words": {"en": i.caption}}) for i in found]
    root.mkdir()
    path = root / "some-train.array_record-00000-of-00001"
    records.write(path, rows)
    splits = {"train": [(len(rows), path.stat().st_size)]}
    records.write_metadata(root, "some", form, splits, version="1.0.0", description="", license="", homepage="")
    return f"tfds:{root}"


def test_all_sources_give_the_same_images_and_captions(copy, tmp_path):
    texts = listed(copy)
    assert [image.caption for image in texts[:2]] == ["red apple number 0", "red apple number 2"]
    assert len(texts) == COUNT and sources.sha256(texts) == sources.sha256(listed(copy))
    prepared = listed(prepare_tfds(tmp_path / "set", texts), "words.en")
    write_metadata(copy)
    for found in (listed(copy, "words.en"), prepared):
        assert [image.caption for image in found] == [image.caption for image in texts]
        for one, other in zip(found, texts, strict=True):
            np.testing.assert_array_equal(sources.pixels(one, 4, 6), sources.pixels(other, 4, 6))


def picture(image, **options) -> sources.RealImage:
    file = io.BytesIO()
    image.save(file, options.pop("format", "PNG"), **options)
    return sources.RealImage("a", "a", "", 0, file.getvalue)


def test_every_kind_of_file_becomes_an_upright_rgb_image():
    upright = image_of(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it
    turned = picture(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    np.testing.assert_array_equal(sources.pixels(turned, 9, 5), np.asarray(upright))
    grey = sources.pixels(picture(upright.convert("L")), 9, 5)
    np.testing.assert_array_equal(grey, np.repeat(np.asarray(upright.convert("L"))[..., None], 3, 2))
    palette = upright.quantize(200)
    np.testing.assert_array_equal(sources.pixels(picture(palette), 9, 5), np.asarray(palette.convert("RGB")))
    clear = upright.convert("RGBA")
    clear.putpixel((0, 0), (9, 9, 9, 0))
    np.testing.assert_array_equal(sources.pixels(picture(clear), 9, 5)[0], [[255] * 3, *np.asarray(upright)[0, 1:]])
    gif = picture(palette, format="GIF", transparency=palette.getpixel((0, 0)))
    assert sources.pixels(gif, 9, 5)[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("size,cut", [((12, 9), (slice(1, 11), slice(0, 9))), ((6, 20), (slice(0, 6), slice(7, 13)))])
def test_the_centre_that_covers_the_size_is_cut(size, cut):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    want = pixels[cut]
    np.testing.assert_array_equal(images.cover(Image.fromarray(pixels), *want.shape[:2]), want)


def damage(path):
    path.write_bytes(path.read_bytes()[:-40])


BAD = [
    (lambda f: (f / "02.txt").unlink(), "02.png has no caption, nor have 0 more of 11 images; write it into the .txt"),
    (lambda f: (f / "02.txt").write_text(" \n"), "02.png has no caption"),
    (lambda f: (f / "02.txt").write_bytes(b"caf\xe9"), "02.txt is not UTF-8"),
    (lambda f: damage(f / "02.png"), "1 of 11 images cannot be used; repair them or take them out: "),
    (lambda f: (f / "02.png").write_text("<html>"), "02.png is not readable as an image: it is a web page"),
    (lambda f: (f / "02.png").write_text("no image"), "02.png is not readable as an image: its format is unknown"),
    (lambda f: (f / "02.png").write_bytes(b""), "02.png is not readable as an image: it is empty"),
    (lambda f: Image.new("I;16", (4, 4)).save(f / "02.png"), "has more than 8 bits per channel (mode I;16)"),
    (lambda f: Image.new("RGB", (99, 2)).save(f / "02.png"), "02.png has 99×2 pixels: one side may be at most 16"),
    (lambda f: shutil.rmtree(f), "config.images.source: there is no directory"),
    (lambda f: (f / "metadata.jsonl").write_text("{]"), "metadata.jsonl, line 1, is not an object in JSON"),
    (lambda f: (f / "metadata.jsonl").write_text('{"file_name": 3}'), 'line 1, is not an object in JSON with a "file'),
    (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "02.png"}'), "has no column 'text'; it has file_name"),
    (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "02.png", "text": "a"}'), "00.png has no caption, nor"),
]


@pytest.mark.parametrize("harm, words", BAD, ids=range(len(BAD)))
def test_bad_images_are_refused_in_one_line_before_anything_is_made(harm, words, teacher, copy, tmp_path):
    harm(copy)
    config = configured(teacher, copy, share=1.0)
    config.check = True
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        main.run(config, str(tmp_path / "run"))
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_an_empty_directory_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images \(\.bmp, \.gif"):
        listed(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    with pytest.raises(FileNotFoundError, match=r"a\.png, which .*metadata\.jsonl names, is missing, as are 0 more"):
        listed(tmp_path)
    with pytest.raises(FileNotFoundError, match="tfds:nowhere: no prepared set"):
        listed("tfds:nowhere")


# ---------------------------------------------------------------- encoding them


def configured(teacher, folder, **fields):
    config = reflow_config(teacher)
    config.images.update({"source": str(folder), "batch": 2} | fields)
    return config


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(real_images, "SHARD_SIZE", 4)


def read_job(teacher, folder, **fields):
    return real_images.read_job(configured(teacher, folder, **fields).images, WeightOptions(), load(teacher), (4, 4, 4))


@pytest.fixture(scope="module")
def encoded(teacher, folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("encoded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_images, "SHARD_SIZE", 4)
        real_images.need(read_job(teacher, folder), workdir)
    return workdir


def test_latents_are_samples_of_the_posterior(encoded, folder, teacher):
    latents, found, pipe = Shards(encoded / "images"), listed(folder), load(teacher)
    vae = pipe.nets["vae"]
    pixels = np.stack([images.to_pixels(sources.pixels(image, 4, 4)) for image in found])
    mean, logvar = jax.jit(lambda p, x: vae.apply(p, x, method="moments"))(pipe.params["vae"], pixels)
    eps = np.stack([noise(0, i, (4, 4, 4)) for i in range(COUNT)]).astype(np.float32)
    want = vae.config.scaling_factor * (mean + np.exp(0.5 * logvar) * eps)
    batch = latents.batch(range(COUNT))
    assert batch["X1"].dtype == np.float16 and relative(batch["X1"].astype(np.float32), want) < 1e-3  # of float16
    assert relative(want, vae.config.scaling_factor * mean) > 1e-2
    np.testing.assert_array_equal(batch["ids"], pipe.tokenizer([image.caption for image in found]))
    assert latents[3]["prompt"] == found[3].caption
    rows = tfds.builder_from_directory(encoded / "images").as_data_source("train")
    assert [row["seed"] for row in rows] == list(range(COUNT))


def test_what_is_encoded_is_not_encoded_again(encoded, folder, teacher, tmp_path, monkeypatch):
    """Of three shards one is lost, as after a kill: it alone is made, in other batches and with the same bytes."""
    workdir = shutil.copytree(encoded, tmp_path / "workdir")
    before = {path.name: path.read_bytes() for path in (workdir / "images").glob("images-*")}
    assert len(before) == 6
    lost = workdir / "images" / "images-train.array_record-00001-of-00003"
    lost.unlink()
    assert not real_images.has_images(workdir)
    made, write = [], real_images.write_shards

    def record(job, directory, shards):
        made.append(shards)
        write(job, directory, shards)

    monkeypatch.setattr(real_images, "write_shards", record)
    for _ in range(2):
        assert len(real_images.need(read_job(teacher, folder, batch=3), workdir)) == COUNT
    assert made == [[1]] and real_images.has_images(workdir)
    assert {path.name: path.read_bytes() for path in (workdir / "images").glob("images-*")} == before


SCRIPT = """
import sys
from pathlib import Path
from helpers import load, read_config
from instaflow_jax.stages.common import loading, real_images
real_images.SHARD_SIZE = 4
config = read_config("reflow").images
config.update({"source": sys.argv[2], "batch": 2})
job = real_images.read_job(config, loading.WeightOptions(), load(sys.argv[1]), (4, 4, 4))
real_images.need(job, Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_four_devices_make_the_same_bytes(encoded, teacher, folder, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    arguments = [str(teacher), str(folder), str(tmp_path)]
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], env=os.environ | flags, cwd=ROOT, check=True)
    for path in (encoded / "images").glob("images-*"):
        assert (tmp_path / "images" / path.name).read_bytes() == path.read_bytes()


def other_vae(teacher, folder):
    pipe = load(teacher)
    pipe.params["vae"]["quant_conv.bias"] = pipe.params["vae"]["quant_conv.bias"] + 1
    pipeline.save(pipe, folder)
    return folder


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: (f / "02.txt").write_text("house"), "images_sha256 is"),
        (lambda f: shutil.copy(f / "02.png", f / "02.webp"), "count is 11, not 12"),
        (None, "vae is"),
    ],
)
def test_changed_images_and_another_autoencoder_are_refused(change, words, encoded, teacher, copy, tmp_path):
    if change:
        change(copy)
    else:
        teacher = other_vae(teacher, tmp_path / "other")
    job = read_job(teacher, copy)
    for use in (real_images.check, real_images.need):
        with pytest.raises(ValueError, match=f"manifest.json belongs to other images: .*{words}.*replace its images"):
            use(job, encoded)


def test_an_autoencoder_of_other_latents_is_refused(teacher, folder):
    with pytest.raises(ValueError, match="the autoencoder makes latents of 4 channels, but 8 are needed"):
        real_images.read_job(configured(teacher, folder).images, WeightOptions(), load(teacher), (4, 4, 8))


# ---------------------------------------------------------------- batches with them


@pytest.fixture(scope="module")
def pairs_folder(teacher, tmp_path_factory):
    """A workdir with pairs."""
    workdir = tmp_path_factory.mktemp("pairs")
    need_pairs(reflow_config(teacher).pairs, workdir)
    return workdir


@pytest.fixture(scope="module")
def pairs(pairs_folder):
    return Pairs(pairs_folder / "pairs")


def mixed(pairs, encoded, rows=3, size=8):
    return MixedBatches(pairs, Share(Shards(encoded / "images"), rows), batch_size=size, seed=1)


def equal(one, other):
    assert one.keys() == other.keys()
    for name, rows in one.items():
        np.testing.assert_array_equal(rows, other[name])


def find(latents: Shards, X1) -> list[int]:
    """The number of the example that each row is, or −1."""
    known = latents.batch(range(len(latents)))["X1"].astype(np.float32)
    return [next((i for i, row in enumerate(known) if np.array_equal(row, x)), -1) for x in X1]


def test_a_share_of_a_batch_is_real_images_with_fresh_noise(pairs, encoded):
    batches, seen, fresh = mixed(pairs, encoded), [], []
    assert {n: (s.shape, s.dtype) for n, s in batches.spec().items()} == {
        n: (a.shape, a.dtype) for n, a in next(batches).items()
    }
    batches.restore({"step": 0})
    for batch in itertools.islice(iter_of(batches), 11):
        found, paired = find(Shards(encoded / "images"), batch["X1"]), find(pairs, batch["X1"])
        real = [i >= 0 for i in found]
        assert real == [False, False, True, False, False, True, False, True]  # evenly spread
        assert all((i >= 0) != is_real for i, is_real in zip(paired, real, strict=True))
        for i in np.flatnonzero(~np.array(real)):
            np.testing.assert_array_equal(batch["X0"][i], pairs[paired[i]]["X0"])
        seen += [i for i in found if i >= 0]
        fresh += list(batch["X0"][real])
    assert sorted(seen) == sorted(3 * list(range(COUNT)))  # three epochs without a gap
    assert seen[:COUNT] != seen[COUNT : 2 * COUNT]
    drawn = np.stack(fresh)
    assert len(np.unique(drawn[:, 0, 0, 0])) == len(drawn) and abs(drawn.mean()) < 0.1 and abs(drawn.std() - 1) < 0.1


def test_batches_are_found_again_by_their_step_and_shared_by_processes(pairs, encoded, monkeypatch):
    one = list(itertools.islice(iter_of(mixed(pairs, encoded)), 5))
    later = mixed(pairs, encoded)
    later.restore({"step": 3})
    equal(next(later), one[3])
    assert later.state() == {"step": 4}
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    parts = []
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(list(itertools.islice(iter_of(mixed(pairs, encoded)), 5)))
    for whole, rows in zip(one, zip(*parts, strict=True), strict=True):
        equal(whole, {name: np.concatenate([row[name] for row in rows]) for name in whole})


def iter_of(batches):
    while True:
        yield next(batches)


def test_real_images_alone_may_be_fewer_than_a_batch(encoded):
    batch = next(mixed(None, encoded, rows=16, size=16))
    assert set(find(Shards(encoded / "images"), batch["X1"])) == set(range(COUNT))


def test_images_beside_the_pairs_leave_these_as_they_are(pairs, encoded):
    beside = BatchesBesideImages(pairs, Shards(encoded / "images"), batch_size=4, seed=1)
    alone, seen = PairBatches(pairs, batch_size=4, seed=1), []
    for _ in range(COUNT):
        batch, want = next(beside), next(alone)
        equal({name: batch[name] for name in want}, want)
        numbers = find(Shards(encoded / "images"), batch["real_X1"])
        np.testing.assert_array_equal(batch["real_ids"], Shards(encoded / "images").batch(numbers)["ids"])
        seen += numbers
    assert sorted(seen) == sorted(4 * list(range(COUNT)))
    assert beside.spec().keys() == batch.keys()


# ---------------------------------------------------------------- the losses

TEXT = types.SimpleNamespace(
    apply=lambda params, ids: types.SimpleNamespace(last_hidden_state=jnp.asarray(params)[ids])
)
FROZEN = {"text_encoder": normal(9, 2048, 3), "null_ids": np.zeros((1, 16), np.int32)}


def test_the_loss_of_a_mixed_batch_is_the_weighted_sum_of_both(pairs, encoded):
    """Eq. 5 on the pairs and flow matching on the images, each by hand from what the network was asked."""
    seen = []

    def record(params, Z, tau, text):
        seen.append(1 - tau / 1000)
        return jnp.sin(Z)

    options = {"time": "uniform", "penalty": "squared", "noise": "paired", "prompt_dropout": 0.0, "num_timesteps": 1000}
    loss = losses.make_reflow_loss(types.SimpleNamespace(apply=record), TEXT, **options)
    batch = next(mixed(pairs, encoded))
    value, t = jax.jit(lambda batch: (loss(0.0, FROZEN, batch, jax.random.key(0))[0], seen.pop()))(batch)
    real = np.array([i >= 0 for i in find(Shards(encoded / "images"), batch["X1"])])

    def by_hand(rows):
        X0, X1 = batch["X0"][rows], batch["X1"][rows]
        return np.mean((np.sin(flow.interpolate(X0, X1, np.asarray(t)[rows])) - (X1 - X0)) ** 2)

    assert real.sum() == 3
    np.testing.assert_allclose(value, 5 / 8 * by_hand(~real) + 3 / 8 * by_hand(real), rtol=1e-5)


def test_the_discriminator_sees_the_images_with_their_captions():
    """Its features are the noised images; the text that comes with them is recorded."""
    texts = []

    def score(params, Xt, tau, text, method=""):
        if method == "middle":
            texts.append(text)
        return {"": 0 * Xt, "middle": Xt, "with_middle": (0 * Xt, Xt)}[method]

    nets = (types.SimpleNamespace(apply=f) for f in (lambda p, Z, tau, text: 0 * Z, score))
    head = types.SimpleNamespace(apply=lambda params, features: features.mean((1, 2, 3)))
    method = score_distillation.Method(
        *nets,
        TEXT,
        head,
        score_distillation.flow_convention(1000),
        alpha=1.0,
        steps=(1,),
        t=(0.9, 0.95),
        prompt_dropout=0.0,
        num_timesteps=1000,
        unroll=False,
    )
    loss = score_distillation.make_fake_loss(method, adversarial=1.0)
    batch = {"X0": normal(0, 8, 4, 4, 2), "X1": normal(1, 8, 4, 4, 2), "ids": np.arange(128).reshape(8, 16)}
    shown = batch | {"real_X1": 5 + batch["X1"], "real_ids": batch["ids"] + 200}

    def run(batch):
        metrics = loss({}, FROZEN | {"student": {}}, batch, jax.random.key(0))[1]
        return metrics["accuracy"], texts.pop()

    with jax.debug_key_reuse(True):
        (before, text), (after, own) = (jax.jit(run)(each) for each in (batch, shown))
    assert after > before + 0.1  # all of the images are found real
    np.testing.assert_array_equal(text, FROZEN["text_encoder"][batch["ids"]])
    np.testing.assert_array_equal(own, FROZEN["text_encoder"][shown["real_ids"]])


# ---------------------------------------------------------------- the stages


def start(encoded, pairs_folder, workdir):
    """A workdir whose images and pairs are there."""
    for name, source in (("images", encoded), ("pairs", pairs_folder)):
        shutil.copytree(source / name, workdir / name)
    return workdir


def train(pairs, encoded, workdir):
    """The toy network on rows of X0 and X1, in the common loop."""

    def loss(params, frozen, batch, key):
        rows = jnp.concatenate([batch[name].reshape(len(batch[name]), -1) for name in ("X0", "X1")], axis=1)
        return toy.loss(params, {"data": rows}, {"row": jnp.arange(len(rows))}, key)

    mesh = devices.make_mesh(fsdp=1)
    step = make_train_step(loss, toy.optimizer(), mesh, ema_decay=0.9, accumulate=1)
    return toy.run(workdir, 6, step=step, batches=mixed(pairs, encoded))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(pairs, encoded, tmp_path):
    """Killed in its fifth step, it continues from its last checkpoint."""
    full = train(pairs, encoded, tmp_path / "full")
    with killed_at(5):
        train(pairs, encoded, tmp_path / "killed")
    assert not (tmp_path / "killed" / "checkpoints" / "6").exists()
    jax.tree.map(
        np.testing.assert_array_equal, toy.leaves(full), toy.leaves(train(pairs, encoded, tmp_path / "killed"))
    )
    assert (tmp_path / "full" / "metrics.jsonl").read_bytes() == (tmp_path / "killed" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("share, rows", [(0.0, None), (0.5, 2), (1.0, 4)])
def test_reflow_takes_what_its_share_needs(share, rows, teacher, folder, encoded, pairs_folder, tmp_path, monkeypatch):
    """Without images it reads none, and the batches are those of pairs; with images alone it needs no pairs."""
    asked = []

    def record(options, directory, pipe, pairs, *_, source, share):
        asked.append((pairs, share))
        batches, _ = flow_training.make_batches(options.train, pairs, share)
        assert (type(batches) is PairBatches) == (rows is None)

    monkeypatch.setattr(flow_training, "train_flow", record)
    workdir = start(encoded, pairs_folder, tmp_path / "run")
    shutil.rmtree(workdir / ("pairs" if rows == 4 else "images" if rows is None else "other"), ignore_errors=True)
    main.run(configured(teacher, folder if rows else "nowhere", share=share), str(workdir))
    [(found, share)] = asked
    assert (found is None) == (rows == 4) and (share and share.rows) == rows
    assert (workdir / "pairs").exists() == (rows != 4) and (workdir / "images").exists() == (rows is not None)


def test_a_share_of_less_than_one_image_is_refused(teacher, folder, tmp_path):
    with pytest.raises(ValueError, match=r"config\.images\.share=0\.1 of a batch of 4 is less than one image: use at"):
        main.run(configured(teacher, folder, share=0.1), str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def refining(teacher, folder, tmp_path):
    """A workdir with a flow, and the config of its refinement with these images."""
    pipe = load(teacher)
    pipeline.save(flow_training.as_flow(pipe, pipe.params["unet"]), tmp_path / "run" / "reflow" / "export")
    config = refine_config(teacher)
    config.images.update({"source": str(folder), "batch": 2})
    return config, tmp_path / "run"


def test_refine_reads_the_images_for_its_discriminator_and_its_score(refining, encoded, pairs, teacher):
    config, workdir = refining
    assert config.score.images is config.images and config.images.share == 1.0
    options = flow_training.read_flow_options(config)
    batch = next(refine.make_batches(config, encoded, options, load(teacher), pairs))
    assert batch["real_X1"].shape == batch["X1"].shape
    config.adversarial = config.fake.adversarial = 0.0
    assert "real_X1" not in next(refine.make_batches(config, encoded, options, load(teacher), pairs))
    config.real = str(workdir / "reflow" / "export")
    words = (
        r"config\.images\.source='.*folder' has no effect with config\.real='.*export' and without config\.adversarial"
    )
    with pytest.raises(ValueError, match=words):
        main.run(config, str(workdir))


def test_a_score_of_other_images_is_refused(refining):
    config, workdir = refining
    shutil.copytree(workdir / "reflow", workdir / "score")
    checkpoints = Checkpoints(workdir / "score" / "checkpoints", keep_last=1, keep_every=0)
    small = train_state.create({"a": np.ones(2, np.float32)}, toy.optimizer())
    checkpoints.save(4, small, {"step": 4}, config.score.to_dict())
    checkpoints.close()
    refine.check_images(config, str(workdir))
    config.images.source = ""
    with pytest.raises(ValueError, match=r"score was trained with images\.source='.*folder', not '': delete it"):
        main.run(config, str(workdir))


def test_a_check_of_refine_reads_the_images(refining, copy):
    config, workdir = refining
    config.images.source = str(copy)
    assert not refine.has_data(config, str(workdir))
    refine.check(config, str(workdir))
    damage(copy / "02.png")
    with pytest.raises(ValueError, match=r"1 of 11 images cannot be used.*02\.png is not readable"):
        refine.check(config, str(workdir))
    assert [path.name for path in workdir.iterdir()] == ["reflow"]
