"""Trains a small CLIP-style tokenizer on the captions of the emoji: byte-level byte-pair encoding.

    python -m tools.train_tokenizer --out DIR

writes the four files that `Tokenizer.from_pretrained`, transformers' `CLIPTokenizer` and its `CLIPTokenizerFast` read.
The vocabulary has CLIP's layout: 256 bytes, the same 256 at the end of a word, one token per merge, <|startoftext|> and
<|endoftext|>.

The embedded tokenizer (`assets/openmoji/tokenizer`) was trained by version 0.1's own trainer, which broke ties between
equally frequent pairs in another order. This one gives a tokenizer of the same kind and size, but not the same files.
"""

import argparse
import json
from collections.abc import Iterable

from tokenizers import pre_tokenizers, trainers

from instaflow_jax.weights.tokenizer import END, SPECIAL, START, WORD_END, Tokenizer, make_engine


def train(texts: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """Learns a tokenizer from distinct captions; their order does not matter.

    Args:
      vocab_size: largest number of tokens, at least 514.
      max_length: number of tokens of a padded prompt, including start and end.

    Raises:
      ValueError: `vocab_size` leaves no room for the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character per byte, in CLIP's order
    symbols = [*alphabet, *(character + WORD_END for character in alphabet)]
    if vocab_size < len(symbols) + 2:
        raise ValueError(f"vocab_size={vocab_size} is too small for 2 x 256 bytes and two special tokens; use >= 514")
    engine = make_engine({}, [], END)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        special_tokens=symbols,  # fixes their ids; the order of the other tokens, and so of ties, follows from them
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    engine.train_from_iterator(sorted(texts), trainer)
    ids = engine.get_vocab(with_added_tokens=False)
    tokens = [*sorted(ids, key=ids.get), START, END]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True} | SPECIAL
    return Tokenizer({token: i for i, token in enumerate(tokens)}, _merges(engine), config)


def _merges(engine) -> list[tuple[str, str]]:
    """The learned merges, which the library shows only in its JSON form."""
    return [tuple(pair) for pair in json.loads(engine.to_str())["model"]["merges"]]


def main() -> None:
    from instaflow_jax.data.openmoji.captions import caption_table
    from instaflow_jax.data.openmoji.drawing import catalogue

    parser = argparse.ArgumentParser(description="train a tokenizer like the embedded one on all OpenMoji captions")
    parser.add_argument("--out", required=True, help="directory for the four files")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--max_length", type=int, default=16)
    args = parser.parse_args()
    texts, _ = caption_table(catalogue()[0])
    train(texts, args.vocab_size, args.max_length).save_pretrained(args.out)


if __name__ == "__main__":
    main()
