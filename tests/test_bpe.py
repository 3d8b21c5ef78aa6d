"""The tokenizer's files: trained the same way twice, read by both of transformers' CLIP tokenizers."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer, CLIPTokenizerFast

import instaflow_jax
from instaflow_jax.data.openmoji.captions import caption_table
from instaflow_jax.data.openmoji.drawing import catalogue
from tools import train_tokenizer as bpe

SHIPPED = Path(instaflow_jax.__path__[0]) / "assets" / "openmoji" / "tokenizer"
TEXTS = ["woman astronaut dark skin tone", "red apple", "man's shoe", "keycap 7", "flag of chad", "keycap #"]


@pytest.fixture(scope="module")
def slow():
    return CLIPTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def texts():
    return caption_table(catalogue()[0])[0]


def test_training_again_gives_the_shipped_files(texts):
    files = bpe.train(reversed(texts), vocab_size=2048, max_length=16)
    shipped = {path.name: path.read_text("utf-8") for path in SHIPPED.iterdir()}
    assert shipped.pop("README.md")
    assert shipped == files


def test_slow_and_fast_tokenizers_agree_on_every_caption(slow, texts):
    fast = CLIPTokenizerFast.from_pretrained(SHIPPED)
    some = texts[::7] + TEXTS
    padded = {"padding": "max_length", "truncation": True}
    assert slow(some, **padded)["input_ids"] == fast(some, **padded)["input_ids"]
    assert slow.model_max_length == fast.model_max_length == 16
    assert slow.pad_token_id == slow.eos_token_id == fast.pad_token_id == 2047 and slow.bos_token_id == 2046


def test_no_caption_is_truncated_and_every_one_reads_back(slow, texts):
    ids = slow(texts)["input_ids"]
    assert max(map(len, ids)) <= slow.model_max_length
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
    assert bpe.learn_merges({"aab": 3, "ab": 2, "xy": 4}, limit=9) == [
        ("a", "b</w>"),
        ("x", "y</w>"),
        ("a", "ab</w>"),
    ]


def test_a_pair_seen_once_is_not_merged():
    assert bpe.learn_merges({"ab": 1, "cd": 1}, limit=9) == []


def test_byte_symbols_are_256_different_printable_characters():
    symbols = bpe.byte_symbols()
    assert len(set(symbols)) == 256 and all(s.isprintable() and not s.isspace() for s in symbols)
    assert symbols[0] == "!" and symbols[94] == "¡"


@pytest.mark.parametrize("captions, size, message", [(["café"], 600, "not ASCII"), (["cafe"], 513, "at least 514")])
def test_training_refuses_what_it_cannot_do(captions, size, message):
    with pytest.raises(ValueError, match=message):
        bpe.train(captions, size, max_length=8)
