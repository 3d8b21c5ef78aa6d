"""CLIP's tokenizer, read from a diffusers `tokenizer/` folder: prompts → token ids of one fixed length.

Built on the `tokenizers` library, because importing transformers would load torch. The ids equal those of transformers'
`CLIPTokenizerFast`. The slow `CLIPTokenizer` gives other ids where its replacement for `ftfy` cleans more than OpenAI's
own tokenizer: it splits CJK words into characters, drops control and joining characters (as inside family emoji) and
distinguishes the Greek final sigma.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import models, normalizers, pre_tokenizers, processors

from instaflow_jax.infra import files, stores
from instaflow_jax.infra.messages import quote
from instaflow_jax.weights import hub

_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_FILES += ("added_tokens.json",)
WORD_END = "</w>"  # ends the last token of every word, so "cat" and the start of "catch" are different tokens
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"
FURTHER = ("additional_special_tokens", "extra_special_tokens")  # the second is transformers 5's
# Defaults of absent keys, as in transformers.
SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}


class Tokenizer:
    """Byte-pair encoding of prompts between a start and an end token, padded to `model_max_length`.

    Attributes:
      vocab: token → id, without tokens that were added later (`added_tokens_decoder` in `config`).
      model_max_length: length of every row, including start and end.
      bos_id, eos_id, pad_id: ids of the start, end and padding tokens.
      size: one more than the largest id, added tokens included.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], config: dict[str, Any]):
        """
        Args:
          vocab: token → id.
          merges: pairs of tokens in the order in which they are joined.
          config: the fields of `tokenizer_config.json` and `special_tokens_map.json`.

        Raises:
          ValueError: a merge or special token is not in the vocabulary, or `model_max_length` is missing.
        """
        self.vocab, self.merges, self.config = vocab, merges, config
        self.model_max_length = _length(config)
        special, learned = _special_tokens(config), _learned_tokens(config)
        _check_merges(vocab, merges)
        _check_special(special, vocab.keys() | {t.content for t in learned.values()})
        self._engine = make_engine(vocab, merges, special["unk_token"].content)
        further = [tokenizers.AddedToken(word, normalized=False, special=True) for word in _further_special(config)]
        self._engine.add_tokens([*learned.values(), *special.values(), *further])  # the first of equal tokens counts
        _check_learned(learned, self._engine)
        self.size = 1 + max(self._engine.get_vocab().values())
        self.bos_id, self.eos_id, self.pad_id = (
            self._engine.token_to_id(special[key].content) for key in ("bos_token", "eos_token", "pad_token")
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, subfolder: str = "tokenizer") -> "Tokenizer":
        """Reads `vocab.json` and `merges.txt`, or else `tokenizer.json`, and their configs, from a folder or hub id.

        Words that were added to the vocabulary (textual inversion) may be listed in `tokenizer_config.json`,
        `added_tokens.json` or `tokenizer.json`.

        Raises:
          FileNotFoundError, ValueError: naming the file that is missing or wrong.
        """
        folder = _folder(source, subfolder)
        vocab, merges = _vocabulary(folder)
        config = files.read_json(folder / "tokenizer_config.json")
        special = folder / "special_tokens_map.json"
        if special.exists() and "added_tokens_decoder" not in config:  # newer configs include the special tokens
            config = config | files.read_json(special)
        try:
            return cls(vocab, merges, _with_learned_words(folder, vocab, config))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the four files that `from_pretrained` and transformers read."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        special = {key: _typed(self.config[key], None) for key in SPECIAL if key in self.config}
        config = {key: _typed(self.config[key], "AddedToken") for key in (*SPECIAL, *FURTHER) if key in self.config}
        texts = {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, self.merges)]),
            "tokenizer_config.json": json.dumps({"tokenizer_class": "CLIPTokenizer"} | self.config | config, indent=2),
            "special_tokens_map.json": json.dumps(special, indent=2),
        }
        for name, text in texts.items():
            files.write_text(directory / name, text + "\n")

    def to_json(self) -> str:
        """A `tokenizer.json` from which the `tokenizers` library alone encodes prompts to the same rows."""
        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        start, end, pad = (engine.id_to_token(i) for i in (self.bos_id, self.eos_id, self.pad_id))
        engine.post_processor = processors.TemplateProcessing(
            single=[start, "$A", end], special_tokens=[(start, self.bos_id), (end, self.eos_id)]
        )
        engine.enable_truncation(self.model_max_length)
        engine.enable_padding(length=self.model_max_length, pad_id=self.pad_id, pad_token=pad)
        return engine.to_str()

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Token ids, int32. A longer prompt is truncated, with a warning that names the prompt and the lost words.

        Raises:
          ValueError: `prompts` is one string instead of a list.
        """
        if isinstance(prompts, str):
            raise ValueError(f"expected a list of prompts, got the string {quote(prompts)}; put it into a list")
        rows = np.full((len(prompts), self.model_max_length), self.pad_id, np.int32)
        for row, prompt in zip(rows, prompts, strict=True):
            ids = [self.bos_id, *self._words(prompt), self.eos_id]
            row[: len(ids)] = ids
        return rows

    def count(self, prompt: str) -> int:
        """Number of tokens of a prompt, without start and end; `model_max_length - 2` of them fit."""
        return len(self._engine.encode(prompt, add_special_tokens=False).ids)

    def _words(self, prompt: str) -> list[int]:
        words, room = self._engine.encode(prompt, add_special_tokens=False), self.model_max_length - 2
        if len(words.ids) > room:
            lost = prompt[words.offsets[room][0] :].strip()
            warnings.warn(
                f"the prompt {quote(prompt)} is longer than the text encoder's {self.model_max_length} tokens; "
                f"these words are lost: {quote(lost)}",
                stacklevel=3,
            )
        return words.ids[:room]


# ---------------------------------------------------------------- reading


def _folder(source: str | Path, subfolder: str) -> Path:
    root = stores.local(source)
    if not root.is_dir():
        prefix = f"{subfolder}/" if subfolder else ""
        root = hub.snapshot(str(source), [prefix + name for name in _FILES])
    if not (root / subfolder).is_dir():
        raise FileNotFoundError(f"{root} has no folder {subfolder!r} to read a tokenizer from")
    return root / subfolder


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab, merges, both = (folder / name for name in _FILES[:3])
    if vocab.is_file() and merges.is_file():
        return files.read_json(vocab), _read_merges(merges)
    if not both.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer: it needs vocab.json and merges.txt, or tokenizer.json")
    model = files.read_json(both).get("model", {})
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != WORD_END:
        raise ValueError(f"{both} is not CLIP's tokenizer: its model must be BPE with words ending in {WORD_END!r}")
    return model["vocab"], [_pair(m, both) for m in model["merges"]]


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error}); download it again") from error
    return [_pair(line, path) for line in lines if line.strip() and not line.startswith("#version")]


def _pair(merge: str | list[str], path: Path) -> tuple[str, str]:
    parts = tuple(merge.split(" ") if isinstance(merge, str) else merge)
    if len(parts) != 2:
        raise ValueError(f"{path}: {merge!r} is not a merge of two tokens; the file may be truncated")
    return parts


def _with_learned_words(folder: Path, vocab: dict[str, int], config: dict[str, Any]) -> dict[str, Any]:
    """The config with the words of `added_tokens.json` and `tokenizer.json` in its `added_tokens_decoder`."""
    listed, found = dict(config.get("added_tokens_decoder", {})), []
    words, whole = folder / "added_tokens.json", folder / "tokenizer.json"
    if words.exists():  # it lists ids alone; transformers too adds the flags like this
        special = {token.content for token in _special_tokens(config).values()} | set(_further_special(config))
        for word, i in files.read_json(words).items():
            found.append((i, {"content": word, "normalized": word not in special, "special": word in special}))
    if whole.exists():
        tokens = files.read_json(whole).get("added_tokens") or []
        found += [(token.get("id"), {key: token[key] for key in token if key != "id"}) for token in tokens]
    ids = vocab | {token["content"]: int(i) for i, token in listed.items()}
    for i, token in found:
        word = token.get("content")
        if not isinstance(word, str) or type(i) is not int:
            raise ValueError(f"an added token is {word!r} with the id {i!r}; use a string and an integer")
        if ids.setdefault(word, i) != i or listed.get(str(i), token)["content"] != word:
            other = f"the id {ids[word]}" if ids[word] != i else f"to {listed[str(i)]['content']!r}"
            raise ValueError(
                f"one file gives {word!r} the id {i}, another {other}; use the files of the same tokenizer"
            )
        if word not in vocab:
            listed.setdefault(str(i), token)
    return config | {"added_tokens_decoder": listed} if listed else config


def _length(config: dict[str, Any]) -> int:
    length = config.get("model_max_length")
    if not isinstance(length, int) or not 2 < length < 10**6:  # transformers writes 10³⁰ for "unknown"
        raise ValueError(
            f"tokenizer_config.json has model_max_length={length!r}; use the number of tokens that the text encoder "
            "takes (its max_position_embeddings)"
        )
    return length


def _special_tokens(config: dict[str, Any]) -> dict[str, tokenizers.AddedToken]:
    """The four special tokens, matched as transformers matches those that a file gives as bare strings.

    It looks for the padding token in the raw prompt (SD 2.x pads with "!", so every "!" of a prompt becomes padding),
    and for the others in the normalized prompt.
    """
    stated = {key: config[key] if config.get(key) is not None else text for key, text in SPECIAL.items()}
    bare = {
        key: {"content": text, "normalized": key != "pad_token"}
        for key, text in stated.items()
        if isinstance(text, str)
    }
    return {key: _added(bare.get(key, token)) for key, token in stated.items()}


def _learned_tokens(config: dict[str, Any]) -> dict[int, tokenizers.AddedToken]:
    """Added tokens by id: the special ones in newer files, and words learned by textual inversion."""
    listed = config.get("added_tokens_decoder", {}).items()
    return {int(i): _added(token) for i, token in sorted(listed, key=lambda item: int(item[0]))}


def _further_special(config: dict[str, Any]) -> list[str]:
    """Special tokens besides the four."""
    groups = [config.get(key) or [] for key in FURTHER]
    tokens = [token for group in groups for token in (group.values() if isinstance(group, dict) else group)]
    return [token["content"] if isinstance(token, dict) else token for token in tokens]


def _added(token: dict[str, Any]) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(**{key: value for key, value in token.items() if key != "__type"})


def _typed(token: Any, kind: str | None) -> Any:
    """A special token, or several, with the type that transformers asks of those in `tokenizer_config.json` alone."""
    if isinstance(token, list):
        return [_typed(t, kind) for t in token]
    if not isinstance(token, dict) or "content" not in token:
        return token
    rest = {key: value for key, value in token.items() if key != "__type"}
    return {"__type": kind} | rest if kind else rest


# ---------------------------------------------------------------- checks (the library itself raises bare Exceptions)


def _check_merges(vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    for first, second in merges:
        missing = [token for token in (first, second, first + second) if token not in vocab]
        if missing:
            raise ValueError(
                f"merge {first!r} + {second!r} needs {missing[0]!r}, which is not in the vocabulary; "
                "use vocab.json and merges.txt of the same tokenizer"
            )


def _check_special(special: dict[str, tokenizers.AddedToken], known: set[str]) -> None:
    for key, token in special.items():
        if token.content not in known:
            raise ValueError(f"{key} is {token.content!r}, which is not in the vocabulary")


def _check_learned(learned: dict[int, tokenizers.AddedToken], engine: tokenizers.Tokenizer) -> None:
    for i, token in learned.items():
        if engine.token_to_id(token.content) != i:
            raise ValueError(
                f"the list of added tokens gives {token.content!r} the id {i}, but in this vocabulary it has "
                f"{engine.token_to_id(token.content)}"
            )


# ---------------------------------------------------------------- the tokenizer itself


def make_engine(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> tokenizers.Tokenizer:
    """CLIP's pipeline: compose, collapse spaces, lower case; split into words, digits and marks; merge bytes."""
    affixes = {"end_of_word_suffix": WORD_END, "continuing_subword_prefix": ""}
    engine = tokenizers.Tokenizer(models.BPE(vocab, merges, **affixes, unk_token=unknown, fuse_unk=False))
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
    engine.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return engine
