"""The emoji data set: reproducible bytes, warnings for what is left out, captions with many right answers."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from instaflow_jax import pipeline
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji import drawing
from instaflow_jax.data.openmoji.augment import augment, turn
from instaflow_jax.data.openmoji.captions import (
    KINDS_WEIGHTS,
    LEVELS,
    caption_table,
    captions,
    clean,
    draw,
    level_probabilities,
)
from instaflow_jax.data.openmoji.groups import SUBGROUPS, subgroup_of
from instaflow_jax.weights.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
# an astronaut with a tone, both splits, and a file named without its presentation selector (2764-FE0F)
SOME = ["1F34E", "1F680", "1F951", "1F955", "1F9D1-200D-1F680", "1F469-1F3FF-200D-1F680", "1F1EB-1F1F7", "2764"]
augmented = jax.jit(augment, static_argnums=(2, 3))


@pytest.fixture(scope="module")
def emoji():
    return drawing.catalogue()[0]


@pytest.fixture(scope="module")
def by_name(emoji):
    return {e.name: e for e in emoji}


@pytest.fixture
def svg_dir(tmp_path):
    folder = tmp_path / "svg"
    folder.mkdir()
    for hexcode in SOME:
        shutil.copy(drawing.svg_directory() / f"{hexcode}.svg", folder)
    return folder


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(tmp_path, svg_dir):
    """In two processes, because protobuf's order of fields differs between processes."""
    first = openmoji.build(tmp_path / "a", svg_dir=svg_dir)
    code = "import sys; from instaflow_jax.data.openmoji.dataset import build; build(sys.argv[1], svg_dir=sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "b", svg_dir], check=True, cwd=ROOT, capture_output=True)
    assert files(first) == files(tmp_path / "b" / first.relative_to(tmp_path / "a"))
    assert [p.name for p in first.parent.iterdir()] == [openmoji.VERSION]


def test_tfds_reads_images_words_and_license(tmp_path, svg_dir):
    builder = tfds.builder_from_directory(openmoji.build(tmp_path, size=16, svg_dir=svg_dir))
    rows = [row for split in openmoji.SPLITS for row in builder.as_data_source(split)]
    assert {row["name"].decode() for row in rows} >= {"red apple", "red heart", "woman astronaut dark skin tone"}
    assert len(rows) == len(SOME) and rows[0]["image"].shape == (16, 16, 3)
    assert "CC BY-SA 4.0" in builder.info.redistribution_info.license
    assert openmoji.ATTRIBUTION in builder.info.description


def test_broken_and_missing_svgs_are_listed_and_counted(tmp_path, svg_dir, caplog, monkeypatch):
    known, _ = drawing.catalogue()
    wanted = [e for e in known if e.hexcode.replace("-FE0F", "") in SOME]
    monkeypatch.setattr(drawing, "catalogue", lambda: (wanted, ["pickle"]))
    (svg_dir / "1F34E.svg").write_text("<svg this is not an image")
    (svg_dir / "1F680.svg").unlink()
    with caplog.at_level(logging.WARNING):
        arrays = openmoji.build(tmp_path, svg_dir=svg_dir)
    assert "3 emoji left out" in caplog.text
    assert all(word in caplog.text for word in ("red apple (1F34E: ", "rocket (1F680: no SVG)", "pickle"))
    splits = tfds.builder_from_directory(arrays).info.splits
    assert sum(split.num_examples for split in splits.values()) == len(SOME) - 2


def test_an_interrupted_build_leaves_nothing_and_a_complete_one_is_reused(tmp_path, svg_dir, monkeypatch):
    def stop(path, size):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "rasterise", stop)
        with pytest.raises(KeyboardInterrupt):
            openmoji.build(tmp_path, svg_dir=svg_dir)
    assert not list((tmp_path / "openmoji" / "32px").iterdir())
    complete = openmoji.build(tmp_path, svg_dir=svg_dir)
    monkeypatch.setattr(drawing, "rasterise", stop)
    assert openmoji.build(tmp_path, svg_dir=svg_dir) == complete


def test_load_returns_every_image_with_its_words(tmp_path, svg_dir):
    openmoji.build(tmp_path, svg_dir=svg_dir)
    both, heldout = openmoji.load(tmp_path), openmoji.load(tmp_path, split="heldout")
    assert both.images.shape == (len(SOME), 32, 32, 3) and both.images.dtype == np.uint8
    for e, image in zip(both.emoji, both.images, strict=True):
        drawn = drawing.rasterise(drawing.svg_directory() / f"{e.hexcode.removesuffix('-FE0F')}.svg", 32)
        assert np.array_equal(image, drawn), e.name
    assert [e.name for e in heldout.emoji] == ["avocado", "carrot"]
    with pytest.raises(ValueError, match="heldout"):
        openmoji.load(tmp_path, split="test")


def test_an_image_without_the_tone_of_its_name_is_left_out(by_name):
    yellow, brown = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    astronauts = [by_name[n] for n in ("astronaut", "astronaut dark skin tone", "astronaut light skin tone")]
    drawn = list(zip(astronauts, (yellow, yellow, brown), strict=True))
    assert drawing._false_tones(drawn) == {"astronaut dark skin tone"}


def test_the_background_is_white_and_colors_are_right():
    apple = drawing.rasterise(drawing.svg_directory() / "1F34E.svg", 32)
    assert (apple[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    red, green, blue = apple[18, 16]
    assert red > 180 and green < 120 and blue < 120


def test_names_are_unique_and_ascii(emoji, by_name):
    assert len(by_name) == len(emoji) > 3900
    assert all(e.name.isascii() and e.name == e.name.lower() and ":" not in e.name for e in emoji)
    assert clean(":Côte_d’Ivoire:") == "cote d'ivoire" and clean(":Antigua_&_Barbuda:") == "antigua and barbuda"


@pytest.mark.parametrize(
    "name, gender, base, tone, subgroup",
    [
        ("woman astronaut dark skin tone", "woman", "astronaut", "dark", "person-role"),
        ("astronaut", "", "astronaut", "", "person-role"),
        ("man walking facing right", "man", "person walking facing right", "", "person-activity"),
        ("man red hair medium skin tone", "man", "person red hair", "medium", "person"),
        ("kiss man man dark and light skin tone", "man and man", "kiss", "dark and light", "family"),
        ("women holding hands", "women", "people holding hands", "", "family"),
        ("family man woman girl boy", "man and woman", "family", "", "family"),
        ("man's shoe", "", "man's shoe", "", "clothing"),
        ("flag of france", "", "flag of france", "", "country-flag"),
        ("keycap 7", "", "keycap 7", "", "keycap"),
    ],
)
def test_names_split_into_their_parts(by_name, name, gender, base, tone, subgroup):
    found = by_name[name]
    assert (found.gender, found.base, found.skin_tone, found.subgroup) == (gender, base, tone, subgroup)


def test_astronaut_matches_every_tone_and_gender(emoji):
    answers = [e for e in emoji if captions(e)["base"] == "astronaut"]
    assert {(e.gender, e.skin_tone) for e in answers} == {
        (gender, tone)
        for gender in ("", "man", "woman")
        for tone in ("", "light", "medium-light", "medium", "medium-dark", "dark")
    }


def test_each_level_is_coarser_than_the_one_before(emoji):
    """Two emoji that share a caption also share the coarser one."""
    for fine, coarse in (("full", "toneless"), ("toneless", "base"), ("subgroup", "kind")):
        wider = {}
        for e in emoji:
            levels = captions(e)
            assert wider.setdefault((e.subgroup, levels[fine]), levels[coarse]) == levels[coarse]


def test_coarse_captions_read_as_phrases(by_name):
    assert captions(by_name["grinning face"])["kind"] == "a face"
    assert captions(by_name["flag of france"])["kind"] == "a flag"
    assert captions(by_name["cat face"])["kind"] == "an animal"
    assert list(captions(by_name["red apple"]).values()) == ["red apple"] * 3 + ["a fruit", "food", ""]


def test_groups_cover_unicode_and_refuse_unknown_symbols():
    assert len(SUBGROUPS) == 98 and len({row.group for row in SUBGROUPS.values()}) == 9
    assert subgroup_of("\U0001f3f4\U000e0067\U000e0062\U000e007f").name == "subdivision-flag"
    with pytest.raises(KeyError):
        subgroup_of("x")


def test_heldout_and_training_emoji_share_no_base(emoji):
    bases = {split: {e.base for e in emoji if openmoji.split_of(e) == split} for split in openmoji.SPLITS}
    mirrored = {base.removesuffix(" facing right") for base in bases["heldout"]}
    assert not mirrored & {base.removesuffix(" facing right") for base in bases["train"]}
    share = sum(openmoji.split_of(e) == "heldout" for e in emoji) / len(emoji)
    assert 0.03 < share < 0.12


def test_draws_depend_on_seed_and_index_alone_and_follow_the_weights(by_name):
    astronaut = by_name["woman astronaut dark skin tone"]
    drawn = [draw(astronaut, 0, i, empty=0.3) for i in range(1500)]
    assert drawn[:50] == [draw(astronaut, 0, i, empty=0.3) for i in range(50)]
    assert drawn != [draw(astronaut, 1, i, empty=0.3) for i in range(1500)]
    level_of = {text: level for level, text in captions(astronaut).items()}
    shares = [np.mean([level_of[text] == level for text in drawn]) for level in LEVELS]
    np.testing.assert_allclose(shares, level_probabilities(0.3), atol=0.04)


def test_other_weights_draw_more_kinds(by_name):
    astronaut = by_name["woman astronaut dark skin tone"]
    drawn = [draw(astronaut, 0, i, 0.0, KINDS_WEIGHTS) for i in range(1000)]
    assert abs(np.mean([text == captions(astronaut)["kind"] for text in drawn]) - 0.25) < 0.04


def test_level_probabilities_give_empty_its_share():
    assert level_probabilities(0.1)[-1] == pytest.approx(0.1) and level_probabilities(0.1).sum() == pytest.approx(1)
    assert level_probabilities(1.0)[-1] == 1
    with pytest.raises(ValueError, match=r"empty=1\.2"):
        level_probabilities(1.2)


def test_caption_table_has_each_emoji_at_each_level(emoji):
    texts, index = caption_table(emoji)
    assert len(set(texts)) == len(texts) and index.shape == (len(emoji), len(LEVELS))
    for row in (0, 1000, len(emoji) - 1):
        assert [texts[i] for i in index[row]] == list(captions(emoji[row]).values())


def test_caption_ids_are_the_tokenized_captions(by_name):
    tokenizer, apple = Tokenizer.from_pretrained(pipeline.locate("openmoji")), by_name["red apple"]
    ids = openmoji.caption_ids(tokenizer, [by_name["house"], apple])
    assert ids.shape == (2, len(LEVELS), tokenizer.model_max_length) and ids.dtype == np.int32
    np.testing.assert_array_equal(ids[1], tokenizer(list(captions(apple).values())))


def square():
    """A gray square on white with a margin of ten pixels."""
    return jnp.ones((1, 32, 32, 3)).at[:, 10:22, 10:22].set(0.25)


def test_augmentation_with_zero_ranges_is_the_identity():
    moved = augmented(jax.random.key(0), square(), 0, 0.0)
    np.testing.assert_allclose(moved, square(), atol=1e-6)


def test_augmentation_shifts_by_whole_pixels_and_fills_with_white():
    dark = jnp.full((64, 8, 8, 3), -1.0)
    moved = augmented(jax.random.key(1), dark, 2, 0.0)
    np.testing.assert_allclose(jnp.abs(moved), 1, atol=1e-6)
    white = {int((m == 1).all((1, 2)).sum()) for m in np.round(moved)}
    assert white == {0, 1, 2}


def test_augmentation_scales_about_the_center():
    moved = augmented(jax.random.key(2), jnp.tile(square(), (64, 1, 1, 1)), 0, 0.2)
    ink = (1 - moved).sum((1, 2, 3)) / (1 - square()).sum()
    assert ink.min() < 0.8 and ink.max() > 1.2 and ink.min() > 0.6 and ink.max() < 1.5
    np.testing.assert_allclose(moved, moved[:, ::-1, ::-1], atol=1e-5)


def test_turn_gives_all_symmetries_and_channel_orders():
    one = jnp.arange(12.0).reshape(1, 2, 2, 3)
    turned = np.asarray(jax.jit(turn)(jax.random.key(3), jnp.tile(one, (2000, 1, 1, 1))))
    assert np.array_equal(np.sort(turned.reshape(2000, -1)), np.tile(np.arange(12.0), (2000, 1)))
    assert len(np.unique(turned.reshape(2000, -1), axis=0)) == 8 * 6
    assert 0.5 < np.mean(np.all(turned[:, 0, 0] % 3 == [0, 1, 2], axis=-1)) < 0.65  # original channel order
