"""Train a small CLIP-style tokenizer: byte-level byte-pair encoding in which a word's last piece ends in `</w>`.

    python -m instaflow_jax.data.bpe --out instaflow_jax/assets/openmoji/tokenizer

writes the four files that `transformers.CLIPTokenizer` and `CLIPTokenizerFast` load from a directory. The vocabulary is
laid out as CLIP's: 256 bytes, the same 256 ending a word, one entry a merge, then <|startoftext|> and <|endoftext|>.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's rule for what a word is, for ASCII text: letters run together, digits stand alone.
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")

Symbols = tuple[str, ...]
Pair = tuple[str, str]


def byte_symbols() -> list[str]:
    """A printable character for each of the 256 bytes, in the order of CLIP's vocabulary (GPT-2's table).

    Bytes that print stand for themselves and come first; the other 68 borrow the characters from U+0100 on.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printing] + [chr(256 + i) for i in range(256 - len(printing))]


def split_words(text: str) -> list[str]:
    """The words CLIP's tokenizer would see: "man's shoe" -> ["man", "'s", "shoe"].

    Raises:
      ValueError: the text is not ASCII, for which this short rule is not CLIP's.
    """
    if not text.isascii():
        raise ValueError(f"caption {text!r} is not ASCII; pass it through captions.clean first")
    return _WORD.findall(text.lower())


def learn_merges(word_counts: Mapping[str, int], limit: int) -> list[Pair]:
    """The most frequent neighbours, again and again, until `limit` merges or every pair left occurs only once.

    Ties go to the alphabetically first pair, so the result depends on the counts alone.
    """
    words = [((*word[:-1], word[-1] + "</w>"), count) for word, count in sorted(word_counts.items())]
    pairs: Counter[Pair] = Counter()
    for symbols, count in words:
        _tally(pairs, symbols, count)
    merges: list[Pair] = []
    while len(merges) < limit:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        for i, (symbols, count) in enumerate(words):
            if best[0] in symbols and best[1] in symbols:
                words[i] = (_merge(symbols, best), count)
                _tally(pairs, symbols, -count)
                _tally(pairs, words[i][0], count)
    return merges


def _tally(pairs: Counter[Pair], symbols: Symbols, count: int) -> None:
    """Count the neighbours of a word that occurs `count` times."""
    for pair in pairwise(symbols):
        pairs[pair] += count


def _merge(symbols: Symbols, pair: Pair) -> Symbols:
    """Join every occurrence of the pair, from the left."""
    merged, i = [], 0
    while i < len(symbols):
        width = 2 if symbols[i : i + 2] == pair else 1
        merged.append("".join(symbols[i : i + width]))
        i += width
    return tuple(merged)


def train(captions: Iterable[str], vocab_size: int, max_length: int) -> dict[str, str]:
    """Learn a tokenizer from distinct captions.

    Args:
      captions: ASCII text; the order does not matter.
      vocab_size: upper bound on the number of tokens, at least 514.
      max_length: tokens in a padded prompt, start and end included.
    Returns:
      File name -> content of the four files of the tokenizer; the same for the same captions.
    Raises:
      ValueError: `vocab_size` leaves no room for the bytes, or a caption is not ASCII.
    """
    alphabet = byte_symbols()
    room = vocab_size - 2 * len(alphabet) - 2
    if room < 0:
        raise ValueError(f"vocab_size={vocab_size} must be at least 514: 2 x 256 bytes and two special tokens")
    merges = learn_merges(Counter(word for text in captions for word in split_words(text)), room)
    tokens = alphabet + [s + "</w>" for s in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
    return {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }


def save(files: Mapping[str, str], directory: str | Path) -> None:
    """Write the files of `train`; an existing tokenizer there is replaced."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(directory) / name).write_text(content, "utf-8")


def main() -> None:
    from instaflow_jax.data.openmoji.captions import caption_table
    from instaflow_jax.data.openmoji.drawing import catalogue

    parser = argparse.ArgumentParser(description="train the tokenizer of the embedded models on all OpenMoji captions")
    parser.add_argument("--out", required=True, help="directory for the four files")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--max_length", type=int, default=16)
    args = parser.parse_args()
    texts, _ = caption_table(catalogue()[0])
    save(train(texts, args.vocab_size, args.max_length), args.out)


if __name__ == "__main__":
    main()
