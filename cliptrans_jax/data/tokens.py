"""Sentences as token ids: published tokenizers (see `published.py`), and one trained here.

All frame a sentence in the same way, see `cliptrans_jax/data/framing.py`.
"""

import dataclasses
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import tokenizers
from etils import epath
from tokenizers import models, normalizers, pre_tokenizers, trainers

from cliptrans_jax.data import byte_pairs
from cliptrans_jax.data.framing import SPECIAL, FramedTokenizer, Tokenizer
from cliptrans_jax.data.published import load_published
from common_jax.config import FieldError, Section
from common_jax.ranges import Size, key_of, shown
from common_jax.untrusted import plain
from common_jax.workdir import read_json, write_bytes

# Byte-level pieces start from all bytes, so no character is unknown.
BYTES = 256


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Section):
    """The tokenizer of sentences.

    Attributes:
      kind: a key of KINDS.
      path: the folder of a published tokenizer's files; empty for `trained`.
      vocab: of `trained`: largest number of ids, languages included.
      lower: of `trained`: lower-cases all texts, so that outputs are in lower case too.
      max_length: most tokens of a sentence, frame included; None for the kind's limit.
    """

    kind: Annotated[str, key_of(lambda: KINDS)] = "trained"
    path: str = ""
    vocab: Size = 2000
    lower: bool = False
    max_length: Size | None = None

    def __post_init__(self):
        super().__post_init__()
        limit = LIMITS[self.kind]
        if self.max_length is not None and not 3 <= self.max_length <= limit:
            raise FieldError(
                f"max_length={self.max_length} must be from 3 (a frame and a token) to {limit}, "
                f"the limit of {self.kind!r}, or None"
            )
        if self.kind == "trained" and self.vocab <= BYTES + len(SPECIAL) + 1:
            raise FieldError(
                f"vocab={self.vocab} must be above {BYTES + len(SPECIAL) + 1}: {BYTES} bytes, "
                f"{len(SPECIAL)} special tokens, a mask; and the languages"
            )
        if self.lower and self.kind != "trained":
            raise FieldError(
                f"lower=True is for kind='trained': {self.kind!r} is published, and lower-cases "
                "texts or does not"
            )
        if (self.path == "") != (self.kind == "trained"):
            rule = "must be empty" if self.kind == "trained" else "must be its folder"
            raise FieldError(f"path={shown(self.path)} {rule} for kind={self.kind!r}")

    @property
    def limit(self) -> int:
        """Most tokens of a sentence, frame included."""
        return LIMITS[self.kind] if self.max_length is None else self.max_length


def load_tokenizer(
    config: TokenizerConfig,
    *,
    key: str = "config.tokenizer",
    sentences: Iterable[str] | None = None,
    languages: Sequence[str] = (),
    path: os.PathLike | str | None = None,
) -> Tokenizer:
    """Loads the tokenizer of `config` without downloading anything.

    Args:
      config: the tokenizer's section.
      key: name of that section, for messages.
      sentences, languages, path: of `trained`: see `load_or_train_tokenizer`.

    Raises:
      FileNotFoundError: the folder lacks the files of the kind.
      ValueError: its files are not a tokenizer of the kind.
    """
    return KINDS[config.kind](config, key, sentences, languages, path)


def load_or_train_tokenizer(
    config: TokenizerConfig,
    sentences: Iterable[str] | None,
    languages: Sequence[str],
    path: os.PathLike | str,
) -> FramedTokenizer:
    """Loads the tokenizer in the file `path`, or trains it and writes that file.

    It merges pairs of bytes (BPE), so decoding restores every text, whatever its characters. Ids
    are <s>, <pad>, </s>, <unk>, the pieces, the languages in order and <mask>. The same sentences
    give the same ids in every process.

    Args:
      config: the tokenizer's section.
      sentences: to train on, in all languages together; None if the file exists.
      languages: those with a token.
      path: a JSON file.

    Raises:
      FileNotFoundError: no file and no sentences.
      ValueError: the file belongs to other sentences, languages or size, or is damaged.
    """
    path, languages = epath.Path(path), tuple(languages)
    if sentences is not None:
        sentences = list(sentences)
    if not path.exists():
        if sentences is None:
            raise FileNotFoundError(f"{path} is missing and there is nothing to train it on")
        record = _train(config, sentences, languages)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps(record, ensure_ascii=False).encode())
    made_from, tokenizer = _read(path)
    made_from = {"lower": False} | made_from
    expected = {"lower": config.lower} | _origin(config, sentences, languages)
    if changed := [key for key in expected if expected[key] != made_from.get(key)]:
        changes = ", ".join(
            f"{key} {plain(repr(made_from.get(key)))} not {expected[key]!r}" for key in changed
        )
        raise ValueError(
            f"{path} was made from other input: {changes}; remove it to train it again, or restore "
            "the config"
        )
    if config.lower:
        tokenizer.normalizer = normalizers.Lowercase()
    return _add_frame(tokenizer, languages, config.limit)


def _read(path: epath.Path) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """Returns the origin of a trained tokenizer, and its pieces.

    Raises:
      ValueError: the file is not one of `_train`.
    """
    try:
        record = read_json(path)
        made_from, text = record.get("made_from"), record.get("bpe")
        if not isinstance(made_from, dict) or not isinstance(text, str):
            raise ValueError("it lacks 'made_from' or 'bpe'")
        bpe = json.loads(text)
        if not isinstance(bpe, dict):
            raise ValueError("its 'bpe' is not an object")
        vocab, merges = byte_pairs.parse(bpe)
        if [vocab.get(token) for token in SPECIAL] != [*range(len(SPECIAL))]:
            raise ValueError(f"its first tokens are not {', '.join(SPECIAL)}")
        return made_from, byte_pairs.byte_tokenizer(vocab, merges)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a tokenizer of this project ({plain(str(error))}); remove it"
        ) from error


def _origin(
    config: TokenizerConfig, sentences: list[str] | None, languages: tuple[str, ...]
) -> dict:
    """Returns the origin of a trained tokenizer, with its sentences as a checksum."""
    origin: dict = {"vocab": config.vocab, "languages": list(languages)}
    if config.lower:  # otherwise not named: files of earlier versions are to stay the same
        origin["lower"] = True
    if sentences is not None:
        origin["sentences"] = zlib.crc32("\n".join(sentences).encode())
    return origin


def _train(config: TokenizerConfig, sentences: list[str], languages: tuple[str, ...]) -> dict:
    room = config.vocab - len(languages) - 1
    if room < BYTES + len(SPECIAL):
        raise ValueError(
            f"config.tokenizer.vocab={config.vocab} is too small for {BYTES} bytes, {len(SPECIAL)} "
            f"special tokens, {len(languages)} languages and a mask"
        )
    tokenizer = byte_pairs.byte_level(models.BPE())
    if config.lower:
        tokenizer.normalizer = normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator((_add_space(text) for text in sentences), trainer)
    logging.info(
        "trained a tokenizer of %d pieces on %d sentences",
        tokenizer.get_vocab_size(),
        len(sentences),
    )
    return {"made_from": _origin(config, sentences, languages), "bpe": tokenizer.to_str()}


def _add_space(text: str) -> str:
    """Adds a space before the text, so that its first word is cut like the others."""
    return f" {text}" if text else ""


def _add_frame(
    tokenizer: tokenizers.Tokenizer, languages: tuple[str, ...], limit: int
) -> FramedTokenizer:
    pieces = tokenizer.get_vocab_size()
    vocab = pieces + len(languages) + 1

    def cut(texts: list[str]) -> list[list[int]]:
        encodings = tokenizer.encode_batch(
            [_add_space(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    return FramedTokenizer(
        cut=cut,
        join=lambda ids: tokenizer.decode(ids, skip_special_tokens=False).removeprefix(" "),
        vocab=vocab,
        language_ids={language: pieces + i for i, language in enumerate(languages)},
        special=frozenset({*range(len(SPECIAL)), *range(pieces, vocab)}),
        limit=limit,
    )


def _load_trained(
    config: TokenizerConfig,
    key: str,
    sentences: Iterable[str] | None,
    languages: Sequence[str],
    path: os.PathLike | str | None,
) -> FramedTokenizer:
    del key
    assert path is not None, "a trained tokenizer needs a file"
    return load_or_train_tokenizer(config, sentences, languages, path)


def _load_published(
    config: TokenizerConfig,
    key: str,
    sentences: Iterable[str] | None,
    languages: Sequence[str],
    path: os.PathLike | str | None,
) -> FramedTokenizer:
    del sentences, languages, path  # needed only for training
    return load_published(config.kind, config.path, limit=config.limit, key=key)


Loader = Callable[
    [TokenizerConfig, str, Iterable[str] | None, Sequence[str], os.PathLike | str | None],
    FramedTokenizer,
]
KINDS: Mapping[str, Loader] = {
    "trained": _load_trained,
    "mbart50": _load_published,
    "nllb": _load_published,
    "m2m100": _load_published,
    "xlmr": _load_published,
    "clip": _load_published,
    "siglip2": _load_published,
    "labse": _load_published,
}
# Most tokens of a sentence: the networks' numbers of positions.
LIMITS: Mapping[str, int] = {
    "trained": 1024,
    "mbart50": 1024,
    "nllb": 1024,
    "m2m100": 1024,
    "xlmr": 512,
    "clip": 77,
    "siglip2": 64,
    "labse": 512,
}
