"""The four networks of the embedded world in small: through the stage their loss falls, and what it writes opens."""

import jax
import numpy as np
import pytest
from helpers import pretrain_config

from instaflow_jax import pipeline, teacher
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji.captions import Emoji
from instaflow_jax.infra import metrics
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.models.lpips import LPIPS, VGGClassifier
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.pretrain import diffusion as pretrain_diffusion
from instaflow_jax.stages.pretrain import losses as pretraining
from instaflow_jax.stages.pretrain import stage as pretrain

NAMES = ("red apple", "cat face", "house", "astronaut", "rocket", "octopus", "grinning face", "flag of japan")


def emoji(count: int) -> openmoji.Arrays:
    """Smooth pictures in place of emoji, so that no test waits for drawing."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (count, 4, 4, 3)).astype(np.uint8)
    words = [
        Emoji(f"{i:X}", NAMES[i % len(NAMES)], "objects", "tool", "", "", NAMES[i % len(NAMES)]) for i in range(count)
    ]
    return openmoji.Arrays(coarse.repeat(8, 1).repeat(8, 2), words)


@pytest.fixture
def no_drawing(monkeypatch):
    monkeypatch.setattr(openmoji, "load", lambda directory, size, split: emoji(8))


def trained(variant: str, workdir, **changed):
    """Runs the stage on eight pictures; the loss must fall, by the averages of the first and last three steps."""
    config = pretrain_config(variant)
    config.update(changed)
    pretrain.run(config, str(workdir))
    rows = metrics.read_json_lines(workdir / variant / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == config.loop.steps and np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3]), losses
    return workdir / "export"


def unmoved(key, pixels):
    return pixels


def test_equal_captions_are_no_mistakes():
    """Eight pictures of one caption: a CLIP that tells nothing apart has the least loss there is, log 8."""

    class Blind:
        def apply(self, params, ids, pixels):
            return type("Out", (), {"logits_per_image": np.zeros((len(pixels), len(ids)), np.float32)})

    loss = pretraining.make_clip_loss(Blind(), unmoved, lambda pixels: pixels, level_probabilities=(1.0,))
    batch = {"image": emoji(8).images, "tokens": np.ones((8, 1, 16), np.int32)}
    value, told = loss({}, {}, batch, jax.random.key(0))
    np.testing.assert_allclose([value, told["accuracy"]], [np.log(8), 1.0], rtol=1e-6)


def test_stratified_times_are_one_from_each_slice():
    tau = np.asarray(pretraining.stratified(jax.random.key(0), 8, 1000))
    np.testing.assert_array_equal(tau // 125, np.arange(8))


def test_min_snr_weighs_clean_latents_down_and_noisy_ones_not():
    abar = np.array([0.99, 0.9, 0.1])
    schedule = teacher.Schedule(abar, "epsilon", None, 0, False, "zero")
    np.testing.assert_allclose(pretraining._min_snr_weight(schedule, 5.0), [5 / 99, 5 / 9, 1.0])
    np.testing.assert_array_equal(pretraining._min_snr_weight(schedule, np.inf), 1.0)


def test_joined_parameters_come_apart_again():
    parts = {"unet": {"a.kernel": 1}, "text_encoder": {"a.kernel": 2, "b": 3}}
    flat = pretraining.joined(parts)
    assert {name: pretraining.part(flat, name) for name in parts} == parts


def test_toned_emoji_are_shown_less_and_first_copies_are_as_drawn():
    words = [Emoji("1", "a", "g", "s", "", "", "a"), Emoji("2", "a dark skin tone", "g", "s", "dark", "", "a")]
    row, moved = pretrain_diffusion.copies(words, plain=3, toned=1)
    assert row.tolist() == [0, 0, 0, 1] and moved.tolist() == [False, True, True, False]


def test_autoencoder_learns_and_is_written_with_latents_of_unit_variance(no_drawing, tmp_path):
    export = trained("autoencoder", tmp_path)
    net, params = AutoencoderKL.from_pretrained(export, "vae")
    z = net.apply(params, emoji(8).images / 127.5 - 1, method="encode")
    np.testing.assert_allclose(np.std(z), 1, atol=0.02)
    assert len(list((tmp_path / "autoencoder" / "grids").iterdir())) == 1


def test_diffusion_learns_and_is_written_as_a_pipeline(no_drawing, tmp_path):
    net = AutoencoderKL.from_config(pretrain_config("autoencoder").model.to_dict())
    net.save_pretrained(net.init(jax.random.key(0)), tmp_path / "given" / "vae")
    export = trained("diffusion", tmp_path, autoencoder=str(tmp_path / "given"))
    pipe = pipeline.load(str(export), variant=None, attention="xla")
    assert pipe.latent_shape == (8, 8, 8) and pipe.tokenizer(["a face"]).shape == (1, 16)


def test_clip_learns_and_is_written(no_drawing, tmp_path):
    net, params = CLIPModel.from_pretrained(trained("clip", tmp_path), "clip")
    assert net.config.vision_config.num_hidden_layers == 1 and params["logit_scale"].size == 1


def test_classifier_learns_and_is_written_as_the_trunk_of_lpips(no_drawing, tmp_path):
    export = trained("classifier", tmp_path)
    _, trunk = VGGClassifier.from_pretrained(export, "classifier")
    net, params = LPIPS.from_pretrained(export, "lpips")
    np.testing.assert_array_equal(params["features.0.kernel"], trunk["features.0.kernel"])
    pixels = emoji(2).images / 127.5 - 1
    there, back = np.asarray(net.apply(params, pixels, pixels[::-1]))
    assert there > 0 and there == pytest.approx(back, rel=1e-4)


def test_unknown_recipe_is_refused(tmp_path):
    config = pretrain_config("clip")
    with config.unlocked():
        config.recipe = "clop"
    with pytest.raises(ValueError, match="clop.*autoencoder, diffusion, clip, classifier"):
        pretrain.run(config, str(tmp_path))
