"""The emoji data set: same bytes twice, nothing lost silently, captions with many right answers."""

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

from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji import drawing
from instaflow_jax.data.openmoji.augment import augment, turn
from instaflow_jax.data.openmoji.captions import LEVELS, caption_table, captions, clean, draw, level_probabilities
from instaflow_jax.data.openmoji.groups import SUBGROUPS, subgroup_of

ROOT = Path(__file__).parent.parent
# an astronaut with a tone, both splits, and a file named without its presentation selector (2764-FE0F)
SOME = ["1F34E", "1F680", "1F951", "1F955", "1F9D1-200D-1F680", "1F469-1F3FF-200D-1F680", "1F1EB-1F1F7", "2764"]


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


def test_two_builds_give_the_same_bytes(tmp_path, svg_dir):
    """In two processes, since that is where protobuf's order of fields differs."""
    first = openmoji.build(tmp_path / "a", svg_dir=svg_dir)
    code = "import sys; from instaflow_jax.data.openmoji import build; build(sys.argv[1], svg_dir=sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "b", svg_dir], check=True, cwd=ROOT, capture_output=True)
    assert files(first) == files(tmp_path / "b" / first.relative_to(tmp_path / "a"))
    assert [p.name for p in first.parent.iterdir()] == [openmoji.VERSION]


def test_tfds_reads_pictures_words_and_licence(tmp_path, svg_dir):
    builder = tfds.builder_from_directory(openmoji.build(tmp_path, size=16, svg_dir=svg_dir))
    rows = [row for split in openmoji.SPLITS for row in builder.as_data_source(split)]
    assert {row["name"].decode() for row in rows} >= {"red apple", "red heart", "woman astronaut dark skin tone"}
    assert len(rows) == len(SOME) and rows[0]["image"].shape == (16, 16, 3)
    assert "CC BY-SA 4.0" in builder.info.redistribution_info.license
    assert openmoji.ATTRIBUTION in builder.info.description


def test_a_broken_and_a_missing_svg_are_named_and_counted(tmp_path, svg_dir, caplog, monkeypatch):
    known, _ = drawing.catalogue()
    wanted = [e for e in known if e.hexcode.replace("-FE0F", "") in SOME]
    monkeypatch.setattr(drawing, "catalogue", lambda: (wanted, ["pickle"]))
    (svg_dir / "1F34E.svg").write_text("<svg this is no picture")
    (svg_dir / "1F680.svg").unlink()
    with caplog.at_level(logging.WARNING):
        arrays = openmoji.build(tmp_path, svg_dir=svg_dir)
    assert "3 emoji left out" in caplog.text
    assert all(word in caplog.text for word in ("red apple (1F34E: ", "rocket (1F680: no SVG)", "pickle"))
    splits = tfds.builder_from_directory(arrays).info.splits
    assert sum(split.num_examples for split in splits.values()) == len(SOME) - 2


def test_an_interrupted_build_leaves_nothing_and_a_whole_one_is_reused(tmp_path, svg_dir, monkeypatch):
    def stop(path, size):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drawing, "rasterise", stop)
        openmoji.build(tmp_path, svg_dir=svg_dir)
    assert not list((tmp_path / "openmoji" / "32px").iterdir())
    whole = openmoji.build(tmp_path, svg_dir=svg_dir)
    monkeypatch.setattr(drawing, "rasterise", stop)
    assert openmoji.build(tmp_path, svg_dir=svg_dir) == whole


def test_load_gives_every_picture_with_its_words(tmp_path, svg_dir):
    openmoji.build(tmp_path, svg_dir=svg_dir)
    both, heldout = openmoji.load(tmp_path), openmoji.load(tmp_path, split="heldout")
    assert both.images.shape == (len(SOME), 32, 32, 3) and both.images.dtype == np.uint8
    for e, image in zip(both.emoji, both.images, strict=True):
        drawn = drawing.rasterise(drawing.svg_directory() / f"{e.hexcode.removesuffix('-FE0F')}.svg", 32)
        assert np.array_equal(image, drawn), e.name
    assert [e.name for e in heldout.emoji] == ["avocado", "carrot"]
    with pytest.raises(ValueError, match="heldout"):
        openmoji.load(tmp_path, split="test")


def test_a_tone_that_the_picture_does_not_show_is_left_out(by_name):
    yellow, brown = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    astronauts = [by_name[n] for n in ("astronaut", "astronaut dark skin tone", "astronaut light skin tone")]
    drawn = list(zip(astronauts, (yellow, yellow, brown), strict=True))
    assert drawing._false_tones(drawn) == {"astronaut dark skin tone"}


def test_background_is_white_and_colours_are_right():
    apple = drawing.rasterise(drawing.svg_directory() / "1F34E.svg", 32)
    assert (apple[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    red, green, blue = apple[18, 16]
    assert red > 180 and green < 120 and blue < 120


def test_names_are_unique_plain_words(emoji, by_name):
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


def test_the_prompt_astronaut_has_every_tone_and_gender_as_answers(emoji):
    answers = [e for e in emoji if captions(e)["base"] == "astronaut"]
    assert {(e.gender, e.skin_tone) for e in answers} == {
        (gender, tone)
        for gender in ("", "man", "woman")
        for tone in ("", "light", "medium-light", "medium", "medium-dark", "dark")
    }


def test_levels_only_widen(emoji):
    """Dropping a level never separates two emoji that shared a caption: each caption has one wider one."""
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


def test_groups_cover_unicode_and_refuse_the_unknown():
    assert len(SUBGROUPS) == 98 and len({row.group for row in SUBGROUPS.values()}) == 9
    assert subgroup_of("\U0001f3f4\U000e0067\U000e0062\U000e007f").name == "subdivision-flag"
    with pytest.raises(KeyError):
        subgroup_of("x")


def test_held_out_emoji_share_no_base_with_training(emoji):
    bases = {split: {e.base for e in emoji if openmoji.split_of(e) == split} for split in openmoji.SPLITS}
    mirrored = {base.removesuffix(" facing right") for base in bases["heldout"]}
    assert not mirrored & {base.removesuffix(" facing right") for base in bases["train"]}
    share = sum(openmoji.split_of(e) == "heldout" for e in emoji) / len(emoji)
    assert 0.03 < share < 0.12


def test_draws_are_a_function_of_seed_and_index_and_follow_the_weights(by_name):
    astronaut = by_name["woman astronaut dark skin tone"]
    drawn = [draw(astronaut, 0, i, empty=0.3) for i in range(1500)]
    assert drawn[:50] == [draw(astronaut, 0, i, empty=0.3) for i in range(50)]
    assert drawn != [draw(astronaut, 1, i, empty=0.3) for i in range(1500)]
    level_of = {text: level for level, text in captions(astronaut).items()}
    shares = [np.mean([level_of[text] == level for text in drawn]) for level in LEVELS]
    np.testing.assert_allclose(shares, level_probabilities(0.3), atol=0.04)


def test_empty_captions_are_as_frequent_as_asked():
    assert level_probabilities(0.1)[-1] == pytest.approx(0.1) and level_probabilities(0.1).sum() == pytest.approx(1)
    assert level_probabilities(1.0)[-1] == 1
    with pytest.raises(ValueError, match="1.2"):
        level_probabilities(1.2)


def test_caption_table_holds_each_emoji_at_each_level(emoji):
    texts, index = caption_table(emoji)
    assert len(set(texts)) == len(texts) and index.shape == (len(emoji), len(LEVELS))
    for row in (0, 1000, len(emoji) - 1):
        assert [texts[i] for i in index[row]] == list(captions(emoji[row]).values())


def picture():
    """A grey square on white with a margin of ten pixels."""
    return jnp.ones((1, 32, 32, 3)).at[:, 10:22, 10:22].set(0.25)


def test_augmentation_without_room_changes_nothing():
    moved = augment(jax.random.key(0), picture(), max_shift=0, max_zoom=0.0)
    np.testing.assert_allclose(moved, picture(), atol=1e-6)


def test_augmentation_shifts_by_whole_pixels_and_fills_with_white():
    dark = jnp.full((64, 8, 8, 3), -1.0)
    moved = jax.jit(augment, static_argnums=(2, 3))(jax.random.key(1), dark, 2, 0.0)
    np.testing.assert_allclose(jnp.abs(moved), 1, atol=1e-6)
    white = {int((m == 1).all((1, 2)).sum()) for m in np.round(moved)}
    assert white == {0, 1, 2}


def test_augmentation_scales_about_the_centre():
    moved = augment(jax.random.key(2), jnp.tile(picture(), (64, 1, 1, 1)), max_shift=0, max_zoom=0.2)
    ink = (1 - moved).sum((1, 2, 3)) / (1 - picture()).sum()
    assert ink.min() < 0.8 and ink.max() > 1.2 and 0.6 < ink.min() and ink.max() < 1.5
    np.testing.assert_allclose(moved, moved[:, ::-1, ::-1], atol=1e-5)


def test_turning_gives_all_symmetries_and_orders_of_colour():
    one = jnp.arange(12.0).reshape(1, 2, 2, 3)
    turned = np.asarray(turn(jax.random.key(3), jnp.tile(one, (2000, 1, 1, 1))))
    assert np.array_equal(np.sort(turned.reshape(2000, -1)), np.tile(np.arange(12.0), (2000, 1)))
    assert len(np.unique(turned.reshape(2000, -1), axis=0)) == 8 * 6
    assert 0.5 < np.mean(np.all(turned[:, 0, 0] % 3 == [0, 1, 2], axis=-1)) < 0.65  # colours as they were
