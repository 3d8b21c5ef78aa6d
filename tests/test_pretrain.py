"""Small versions of the four embedded networks: training lowers their loss, and the exported files load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load, make_emoji, pretrain_config

from instaflow_jax import teacher
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji.captions import Emoji
from instaflow_jax.infra import metrics
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.models.lpips import LPIPS, VGGClassifier
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.pretrain import losses, stage
from instaflow_jax.stages.pretrain.diffusion import repeat_emoji

pytestmark = pytest.mark.usefixtures("fast_compilation")

DATA = openmoji.Arrays(*(rows[:8] for rows in make_emoji()))


@pytest.fixture
def no_drawing(monkeypatch):
    monkeypatch.setattr(openmoji, "load", lambda *_: DATA)


def trained(variant: str, workdir, **changed):
    """Runs the stage on eight images; the loss must fall, by the averages of the first and last three steps."""
    config = pretrain_config(variant)
    config.update(changed)
    stage.run(config, str(workdir))
    rows = metrics.read_json_lines(workdir / variant / "metrics.jsonl")
    values = [row["loss"] for row in rows if "loss" in row]
    assert len(values) == config.loop.steps and np.mean(values[-3:]) < 0.9 * np.mean(values[:3]), values
    return workdir / "export"


def test_equal_captions_are_not_mistakes():
    """Eight images with one caption: a CLIP that cannot distinguish them has the lowest possible loss, log 8."""

    class Blind:
        def apply(self, params, ids, pixels):
            return type("Out", (), {"logits_per_image": np.zeros((len(pixels), len(ids)), np.float32)})

    loss = losses.make_clip_loss(Blind(), lambda key, pixels: pixels, level_probabilities=(1.0,))
    batch = {"image": jnp.asarray(DATA.images), "ids": jnp.ones((8, 1, 16), jnp.int32)}
    value, logged = loss({}, {}, batch, jax.random.key(0))
    np.testing.assert_allclose([value, logged["accuracy"]], [np.log(8), 1.0], rtol=1e-6)


def test_stratified_timesteps_are_one_from_each_slice():
    tau = np.asarray(losses.stratified(jax.random.key(0), 8, 1000))
    np.testing.assert_array_equal(tau // 125, np.arange(8))


def test_min_snr_weighs_clean_latents_down_and_noisy_ones_not():
    abar = np.array([0.99, 0.9, 0.1])
    schedule = teacher.Schedule(abar, "epsilon", None, False, "zero")
    np.testing.assert_allclose(losses.min_snr_weight(schedule, 5.0), [5 / 99, 5 / 9, 1.0])
    np.testing.assert_array_equal(losses.min_snr_weight(schedule, np.inf), 1.0)


def test_joined_parameters_come_apart_again():
    a, b, c = np.eye(3)
    parts = {"unet": {"a.kernel": a}, "text_encoder": {"a.kernel": b, "b": c}}
    flat = losses.join(parts)
    jax.tree.map(np.testing.assert_array_equal, {name: losses.part(flat, name) for name in parts}, parts)


def test_toned_emoji_are_shown_less_and_first_copies_are_as_drawn():
    words = [Emoji("1", "a", "g", "s", "", "", "a"), Emoji("2", "a dark skin tone", "g", "s", "dark", "", "a")]
    row, moved = repeat_emoji(words, plain=3, toned=1)
    assert row.tolist() == [0, 0, 0, 1] and moved.tolist() == [False, True, True, False]


@pytest.mark.slow
def test_autoencoder_learns_and_is_written_with_latents_of_unit_variance(no_drawing, tmp_path):
    export = trained("autoencoder", tmp_path)
    net, params = AutoencoderKL.from_pretrained(export, "vae")
    z = net.apply(params, DATA.images / 127.5 - 1, method="encode")
    np.testing.assert_allclose(np.std(z), 1, atol=0.02)
    assert len(list((tmp_path / "autoencoder" / "grids").iterdir())) == 1


@pytest.mark.slow
def test_diffusion_learns_and_is_written_as_a_pipeline(no_drawing, tmp_path):
    net = AutoencoderKL.from_config(pretrain_config("autoencoder").model.to_dict())
    net.save_pretrained(net.init(jax.random.key(0)), tmp_path / "given" / "vae")
    export = trained("diffusion", tmp_path, autoencoder=str(tmp_path / "given"))
    pipe = load(export)
    assert pipe.latent_shape == (8, 8, 8) and pipe.tokenizer(["a face"]).shape == (1, 16)


@pytest.mark.slow
def test_clip_learns_and_is_written(no_drawing, tmp_path):
    net, params = CLIPModel.from_pretrained(trained("clip", tmp_path), "clip")
    assert net.config.vision_config.num_hidden_layers == 1 and params["logit_scale"].size == 1


@pytest.mark.slow
def test_classifier_learns_and_is_written_as_the_trunk_of_lpips(no_drawing, tmp_path):
    export = trained("classifier", tmp_path)
    _, trunk = VGGClassifier.from_pretrained(export, "classifier")
    net, params = LPIPS.from_pretrained(export, "lpips")
    np.testing.assert_array_equal(params["features.0.kernel"], trunk["features.0.kernel"])
    pixels = DATA.images[:2] / 127.5 - 1
    there, back = np.asarray(net.apply(params, pixels, pixels[::-1]))
    assert there > 0 and there == pytest.approx(back, rel=1e-4)


def test_unknown_recipe_is_refused(tmp_path):
    config = pretrain_config("clip")
    with config.unlocked():
        config.recipe = "clop"
    with pytest.raises(ValueError, match=r"clop.*autoencoder, diffusion, clip, classifier"):
        stage.run(config, str(tmp_path))
