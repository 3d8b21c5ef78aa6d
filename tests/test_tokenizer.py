"""The tokenizer against both of transformers' CLIP tokenizers, and its warnings and errors."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers import FAST_ONLY_PROMPTS, LEARNED_PROMPTS, PLAIN_PROMPTS, references, save_tokenizer

from instaflow_jax.pipeline import EMBEDDED
from instaflow_jax.weights.tokenizer import Tokenizer

SOURCE = EMBEDDED / "openmoji" / "tokenizer"


@pytest.fixture(params=["sd1", "sd2"])
def folder(request, tmp_path):
    """The embedded tokenizer as shipped (SD 1.x pads with the end token), and with "!" as padding (SD 2.x)."""
    target = tmp_path / "tokenizer"
    shutil.copytree(SOURCE, target)
    if request.param == "sd2":
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            config = json.loads((target / name).read_text())
            (target / name).write_text(json.dumps(config | {"pad_token": "!"}))
    return target


def test_the_warning_about_a_long_prompt_quotes_a_part_of_it():
    tokenizer = Tokenizer.from_pretrained(SOURCE, subfolder="")
    with pytest.warns(UserWarning, match="these words are lost") as warned:
        tokenizer(["cat " * 2500])
    assert len(str(warned[0].message)) < 300


def test_equal_to_transformers(folder):
    references()
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    ours = Tokenizer.from_pretrained(folder.parent)
    for cls, prompts in ((CLIPTokenizerFast, PLAIN_PROMPTS + FAST_ONLY_PROMPTS), (CLIPTokenizer, PLAIN_PROMPTS)):
        theirs = cls.from_pretrained(folder)(prompts, padding="max_length", truncation=True).input_ids
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = ours(prompts)
        assert got.dtype == np.int32 and got.shape == (len(prompts), ours.model_max_length)
        for prompt, a, b in zip(prompts, got, theirs, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{cls.__name__} {prompt!r}")


def test_the_json_of_a_tokenizer_alone_gives_the_same_rows(folder):
    ours, prompts = Tokenizer.from_pretrained(folder.parent), PLAIN_PROMPTS + FAST_ONLY_PROMPTS + ["cat " * 20]
    alone = tokenizers.Tokenizer.from_str(ours.to_json())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = ours(prompts)
    np.testing.assert_array_equal([row.ids for row in alone.encode_batch(prompts)], want)


def test_newer_files_with_learned_words_are_read(folder, tmp_path):
    """`added_tokens_decoder` as written by transformers after textual inversion; vocabulary in one file or two."""
    references()
    from transformers import CLIPTokenizerFast

    theirs = CLIPTokenizerFast.from_pretrained(folder)
    theirs.add_tokens(["<cat-toy>", "blorp"])
    save_tokenizer(theirs, tmp_path / "new")
    prompts = ["a <cat-toy>", "BLORP! x<cat-toy>y <CAT-TOY>", "wow! ! <|startoftext|> café"]
    want = np.array(theirs(prompts, padding="max_length", truncation=True).input_ids)
    np.testing.assert_array_equal(Tokenizer.from_pretrained(tmp_path, "new")(prompts), want)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "new" / name).unlink()
    tokenizer = Tokenizer.from_pretrained(tmp_path, "new")
    np.testing.assert_array_equal(tokenizer(prompts), want)
    tokenizer.save_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(Tokenizer.from_pretrained(tmp_path, "copy")(prompts), want)


def learned(folder, where):
    """Writes "<cat-toy>" and "blorp" as learned words into one file of `folder`, as transformers writes it there."""
    references()
    from transformers import CLIPTokenizerFast

    theirs = CLIPTokenizerFast.from_pretrained(folder)
    theirs.add_tokens(["<cat-toy>", "blorp"])
    save_tokenizer(theirs, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if where != "decoder":
        del config["added_tokens_decoder"]
    for name in {"added_tokens.json", "tokenizer.json"} - {where}:
        (folder / name).unlink()
    if where == "tokenizer.json":  # transformers 5 writes no other vocabulary
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            (folder / name).unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("where", ["decoder", "added_tokens.json", "tokenizer.json"])
def test_learned_words_of_any_file_keep_their_ids(where, folder, tmp_path):
    references()
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    learned(folder, where)
    want = CLIPTokenizerFast.from_pretrained(folder)(LEARNED_PROMPTS, padding="max_length", truncation=True).input_ids
    ours = Tokenizer.from_pretrained(tmp_path)
    np.testing.assert_array_equal(ours(LEARNED_PROMPTS), want)
    assert ours(LEARNED_PROMPTS[:1])[0, 2] == len(ours.vocab) and ours.size == len(ours.vocab) + 2
    ours.save_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(Tokenizer.from_pretrained(tmp_path, "copy")(LEARNED_PROMPTS), want)
    for cls in (CLIPTokenizer, CLIPTokenizerFast):
        theirs = cls.from_pretrained(tmp_path / "copy")
        np.testing.assert_array_equal(theirs(LEARNED_PROMPTS[:1], padding="max_length").input_ids, want[:1])


@pytest.mark.parametrize("field", ["additional_special_tokens", "extra_special_tokens"])
def test_special_tokens_without_an_id_follow_the_vocabulary(field, tmp_path):
    references()
    from transformers import CLIPTokenizerFast

    folder = Path(shutil.copytree(SOURCE, tmp_path / "tokenizer"))
    edit_json(folder / "tokenizer_config.json", additional_special_tokens=["<cat-toy>", "<dog>"])
    want = CLIPTokenizerFast.from_pretrained(folder)(LEARNED_PROMPTS, padding="max_length").input_ids
    edit_json(folder / "tokenizer_config.json", **{"additional_special_tokens": [], field: ["<cat-toy>", "<dog>"]})
    ours = Tokenizer.from_pretrained(tmp_path)
    np.testing.assert_array_equal(ours(LEARNED_PROMPTS), want)
    ours.save_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(Tokenizer.from_pretrained(tmp_path, "copy")(LEARNED_PROMPTS), want)


def test_saved_files_are_read_by_transformers_and_by_us(folder, tmp_path):
    references()
    from transformers import CLIPTokenizer

    ours = Tokenizer.from_pretrained(folder, subfolder="")
    ours.save_pretrained(tmp_path / "copy")
    want = ours(PLAIN_PROMPTS[:3])
    np.testing.assert_array_equal(Tokenizer.from_pretrained(tmp_path / "copy", subfolder="")(PLAIN_PROMPTS[:3]), want)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(theirs(PLAIN_PROMPTS[:3], padding="max_length").input_ids, want)


def test_a_long_prompt_is_truncated_with_a_warning_that_names_the_lost_words():
    tokenizer = Tokenizer.from_pretrained(SOURCE, subfolder="")
    prompt = "red apple " * 10 + "green pear"
    with pytest.warns(UserWarning, match="these words are lost") as warned:
        ids = tokenizer([prompt])
    (message,) = (str(w.message) for w in warned)
    assert message.endswith("green pear'") and "these words are lost" in message and prompt[:70] in message
    assert ids[0, 0] == tokenizer.bos_id and ids[0, -1] == tokenizer.eos_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["red apple"])


def test_a_string_instead_of_a_list_is_refused():
    with pytest.raises(ValueError, match="expected a list of prompts, got the string 'house'"):
        Tokenizer.from_pretrained(SOURCE, subfolder="")("house")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NOT_CLIPS = '{"model": {"type": "WordPiece"}}'
DAMAGES = {  # what happens to the folder → the error and its words
    "no vocabulary": (
        lambda d: (d / "vocab.json").unlink(),
        FileNotFoundError,
        "has no tokenizer: it needs vocab.json",
    ),
    "no config": (
        lambda d: (d / "tokenizer_config.json").unlink(),
        FileNotFoundError,
        "tokenizer_config.json is missing",
    ),
    "broken JSON": (lambda d: (d / "vocab.json").write_text('{"a": 1'), ValueError, "vocab.json is not valid JSON"),
    "half a merge": (
        lambda d: (d / "merges.txt").write_text("#version: 0.2\na b\nc"),
        ValueError,
        "'c' is not a merge of two tokens",
    ),
    "other merges": (lambda d: (d / "merges.txt").write_text("qqq zzz\n"), ValueError, "of the same tokenizer"),
    "no length": (lambda d: (d / "tokenizer_config.json").write_text("{}"), ValueError, "model_max_length=None"),
    "unknown padding": (
        lambda d: edit_json(d / "special_tokens_map.json", pad_token="<pad>"),
        ValueError,
        "pad_token is '<pad>', which",
    ),
    "wrong id": (
        lambda d: edit_json(d / "tokenizer_config.json", added_tokens_decoder={"7": {"content": "blorp"}}),
        ValueError,
        "gives 'blorp' the id 7",
    ),
    "two ids": (
        lambda d: [
            edit_json(d / "tokenizer_config.json", added_tokens_decoder={"2048": {"content": "blorp"}}),
            (d / "added_tokens.json").write_text('{"blorp": 2049}'),
        ],
        ValueError,
        "one file gives 'blorp' the id 2049, another the id 2048; use the files",
    ),
    "two words": (
        lambda d: [
            edit_json(d / "tokenizer_config.json", added_tokens_decoder={"2048": {"content": "blorp"}}),
            (d / "added_tokens.json").write_text('{"<cat-toy>": 2048}'),
        ],
        ValueError,
        "one file gives '<cat-toy>' the id 2048, another to 'blorp'; use the files",
    ),
    "no id": (
        lambda d: (d / "added_tokens.json").write_text('{"blorp": "2048"}'),
        ValueError,
        "an added token is 'blorp' with the id '2048'; use",
    ),
    "another model": (
        lambda d: [(d / "vocab.json").unlink(), (d / "tokenizer.json").write_text(NOT_CLIPS)],
        ValueError,
        "is not CLIP's tokenizer",
    ),
    "no folder": (lambda d: shutil.rmtree(d), FileNotFoundError, "has no folder 'tokenizer'"),
}


@pytest.mark.parametrize("damage, error, words", DAMAGES.values(), ids=DAMAGES.keys())
def test_broken_files_are_named(damage, error, words, tmp_path):
    folder = Path(shutil.copytree(SOURCE, tmp_path / "tokenizer"))
    damage(folder)
    with pytest.raises(error) as raised:
        Tokenizer.from_pretrained(tmp_path)
    assert words in str(raised.value) and str(tmp_path) in str(raised.value)
