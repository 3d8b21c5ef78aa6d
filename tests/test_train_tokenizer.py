"""The tokenizer's trainer, and the shipped tokenizer: both are read by transformers' two CLIP tokenizers."""

import hashlib

import numpy as np
import pytest
from helpers import TOKENIZER, references

from instaflow_jax.data.openmoji.captions import caption_table
from instaflow_jax.data.openmoji.drawing import catalogue
from instaflow_jax.weights.tokenizer import Tokenizer
from tools import train_tokenizer

TEXTS = ["woman astronaut dark skin tone", "red apple", "man's shoe", "keycap 7", "flag of chad", "keycap #"]
SHIPPED = {  # SHA-256 of what version 0.1 shipped; the embedded models depend on every id
    "vocab.json": "cf04431e73ffa7743ac20019a67fb35ff738c80fd603eb238f6e495dc4d5900d",
    "merges.txt": "42011bae7375ce4e79d5881dcaa5cd3bd8574e73e995a9a90cfe0703959a5fdc",
}


@pytest.fixture(scope="module")
def texts():
    return caption_table(catalogue()[0])[0]


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """Files of a tokenizer trained on all captions."""
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer.train(texts, vocab_size=2048, max_length=16).save_pretrained(folder)
    return folder


@pytest.fixture(params=["shipped", "trained"])
def folder(request, trained):
    return TOKENIZER if request.param == "shipped" else trained


@pytest.fixture
def slow(folder):
    references()
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def test_training_again_gives_the_same_files(texts, trained, tmp_path):
    train_tokenizer.train(reversed(texts), vocab_size=2048, max_length=16).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in trained.iterdir()}


def test_the_shipped_files_are_unchanged():
    assert {name: hashlib.sha256((TOKENIZER / name).read_bytes()).hexdigest() for name in SHIPPED} == SHIPPED


def test_shipped_and_trained_tokenizers_have_one_layout_and_one_config(trained):
    shipped, ours = (Tokenizer.from_pretrained(folder, subfolder="") for folder in (TOKENIZER, trained))
    assert list(shipped.vocab)[:512] == list(ours.vocab)[:512] and list(shipped.vocab)[-2:] == list(ours.vocab)[-2:]
    assert len(shipped.vocab) == len(ours.vocab) == 2048 and shipped.config == ours.config
    assert list(ours.vocab.values()) == list(range(2048))
    assert list(ours.vocab)[512:-2] == ["".join(pair) for pair in ours.merges]


def test_slow_and_fast_tokenizers_and_ours_agree(folder, slow, texts):
    from transformers import CLIPTokenizerFast

    fast, ours = CLIPTokenizerFast.from_pretrained(folder), Tokenizer.from_pretrained(folder, subfolder="")
    some, padded = texts[::7] + TEXTS, {"padding": "max_length", "truncation": True}
    ids = slow(some, **padded)["input_ids"]
    assert ids == fast(some, **padded)["input_ids"]
    np.testing.assert_array_equal(ours(some), ids)
    assert slow.model_max_length == fast.model_max_length == ours.model_max_length == 16
    assert slow.pad_token_id == slow.eos_token_id == fast.pad_token_id == 2047 and slow.bos_token_id == 2046


def test_no_caption_is_truncated_and_every_one_reads_back(slow, texts):
    assert max(map(len, slow(texts)["input_ids"])) <= slow.model_max_length
    for text, row in zip(TEXTS, slow(TEXTS)["input_ids"], strict=True):
        assert slow.decode(row, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
        assert slow.unk_token_id not in row[1:-1]


def test_any_text_has_a_code(slow):
    ids = slow("Déjà vu 😀 zyx")["input_ids"]
    assert slow.unk_token_id not in ids[1:-1]
    assert "zyx" in slow.decode(ids)


def test_frequent_words_are_one_token(slow):
    assert slow.tokenize("woman dark skin tone") == ["woman</w>", "dark</w>", "skin</w>", "tone</w>"]


def test_merges_take_the_most_frequent_pair_first():
    texts = ["aab 1", "aab 2", "aab 3", "ab 4", "ab 5", *(f"xy {i}" for i in range(4))]
    assert train_tokenizer.train(texts, 600, 8).merges == [("a", "b</w>"), ("x", "y</w>"), ("a", "ab</w>")]


def test_a_pair_seen_once_is_not_merged_and_the_vocabulary_stays_small():
    assert train_tokenizer.train(["ab", "cd"], 600, 8).merges == []
    assert len(train_tokenizer.train(["aab xy"] * 3, 515, 8).vocab) == 515


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=513 is too small.*use >= 514"):
        train_tokenizer.train(["cafe"], 513, max_length=8)
