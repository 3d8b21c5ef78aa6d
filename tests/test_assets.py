"""The embedded models: complete, small, readable by the reference libraries, with the same images there as here."""

import json

import jax
import numpy as np
import pytest
from helpers import projected

from instaflow_jax import pipeline, sampling
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.models.lpips import LPIPS, VGGClassifier

DIRECTORY = pipeline.EMBEDDED / "openmoji"
CARDS = ("unet", "text_encoder", "vae", "clip", "lpips", "classifier", "tokenizer")
PROMPTS = ("red apple", "woman astronaut dark skin tone", "a face")


@pytest.fixture(scope="module")
def pipe():
    return pipeline.load("openmoji", variant=None, attention="xla")


def test_all_files_together_stay_small():
    size = sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file())
    assert 1e6 < size < 20e6


@pytest.mark.parametrize("part", CARDS)
def test_every_part_has_a_card_with_licence_and_attribution(part):
    card = (DIRECTORY / part / "README.md").read_text()
    assert "CC BY-SA 4.0" in card and "OpenMoji" in card


@pytest.mark.slow
def test_autoencoder_reconstructs_discs_that_it_was_not_trained_on(pipe):
    net, params = pipe.nets["vae"], pipe.params["vae"]
    colors = np.array([[1, -0.7, -0.7], [-0.4, -0.2, 0.9], [0.9, 0.8, -0.5]], np.float32)
    y, x = np.mgrid[:32, :32] - 15.5
    pixels = np.where((x**2 + y**2 < 100)[None, :, :, None], colors[:, None, None], 1.0).astype(np.float32)
    output = np.asarray(net.apply(params, pixels))
    assert 10 * np.log10(4 / np.mean((output - pixels) ** 2)) > 18


@pytest.mark.slow
def test_prompts_make_a_difference(pipe):
    """Images of two prompts from the same noise differ by more than noise in the guidance would explain."""
    solve = sampling.make_solve(
        pipe.nets["unet"].apply, sampling.read_dynamics(pipe.scheduler, pipe.index, "auto"), "auto", 8, 3.0
    )
    generate = jax.jit(sampling.make_generate(pipe.nets, solve))
    X0 = sampling.noise(np.zeros(2, np.uint32), pipe.latent_shape)
    apple, tree = np.asarray(
        generate(pipe.params, pipe.tokenizer(["red apple", "evergreen tree"]), pipe.tokenizer([""]), X0)[0], np.float32
    )
    assert np.abs(apple - tree).mean() > 15


def test_classifier_and_lpips_share_one_trunk_and_clip_fits_the_tokenizer(pipe):
    clip, _ = CLIPModel.from_pretrained(DIRECTORY, "clip")
    assert clip.config.text_config.vocab_size == pipe.nets["text_encoder"].config.vocab_size
    _, trunk = VGGClassifier.from_pretrained(DIRECTORY, "classifier")
    _, params = LPIPS.from_pretrained(DIRECTORY, "lpips")
    assert len(json.loads((DIRECTORY / "classifier" / "classes.json").read_text())) == trunk["classifier.bias"].size
    assert all(np.array_equal(params[name], trunk[name]) for name in trunk if name.startswith("features."))
    assert all((params[name] >= 0).all() for name in params if name.startswith("lin"))


@pytest.mark.slow
def test_diffusers_gives_the_same_images_from_the_same_noise(pipe, torch):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    N, alpha = 10, 3.0
    X0 = sampling.noise(np.arange(len(PROMPTS), dtype=np.uint32), pipe.latent_shape)
    reference = StableDiffusionPipeline.from_pretrained(DIRECTORY).to(torch.float32)
    reference.scheduler = DPMSolverMultistepScheduler.from_config(reference.scheduler.config)
    reference.set_progress_bar_config(disable=True)
    theirs = reference(
        list(PROMPTS),
        num_inference_steps=N,
        guidance_scale=alpha,
        output_type="np",
        latents=torch.from_numpy(np.array(X0)).permute(0, 3, 1, 2),
    ).images

    solve = sampling.make_solve(
        pipe.nets["unet"].apply, sampling.read_dynamics(pipe.scheduler, pipe.index, "auto"), "dpm_solver", N, alpha
    )
    ids = pipe.tokenizer(["", *PROMPTS])
    text = pipe.nets["text_encoder"].apply(pipe.params["text_encoder"], ids).last_hidden_state
    X1 = jax.jit(solve)(pipe.params["unet"], X0, text[1:], text[:1])
    ours = np.asarray(pipe.nets["vae"].apply(pipe.params["vae"], X1, method="decode")) / 2 + 0.5
    np.testing.assert_allclose(ours.clip(0, 1), theirs, atol=1e-4)


@pytest.mark.slow
def test_transformers_gives_the_same_embeddings(pipe, torch):
    from transformers import CLIPModel as Reference
    from transformers import CLIPTokenizer

    ids = CLIPTokenizer.from_pretrained(DIRECTORY / "tokenizer")(list(PROMPTS), padding="max_length").input_ids
    np.testing.assert_array_equal(pipe.tokenizer(list(PROMPTS)), ids)
    net, params = CLIPModel.from_pretrained(DIRECTORY, "clip")
    reference = Reference.from_pretrained(DIRECTORY / "clip").float().eval()
    with torch.no_grad():
        theirs = projected(reference.get_text_features(torch.tensor(ids))).numpy()
    ours = net.apply(params, np.asarray(ids), method="get_text_features")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
