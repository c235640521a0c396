"""Sentences as token ids: published tokenizers (see `published.py`), and one trained here.

All frame a sentence in the same way, see `cliptrans_jax/data/tokenizers/framing.py`.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tokenizers
from etils import epath
from tokenizers import models, normalizers, pre_tokenizers, trainers

from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.data.tokenizers import byte_pairs
from cliptrans_jax.data.tokenizers.framing import SPECIAL, FramedTokenizer, Tokenizer
from cliptrans_jax.data.tokenizers.published import PUBLISHED, load_published
from common_jax import hosts
from common_jax.config import FieldError, Section
from common_jax.inputs.ragged import Chain, Lines, Ragged, joined
from common_jax.ranges import Size, one_of, shown
from common_jax.untrusted import plain
from common_jax.workdir import in_bucket, read_arrays, read_json, write_arrays, write_bytes

# Sentences per split. Two cores encode fewer in about 2 s, so caching those would save little.
LARGE = 1 << 17
LONGEST = 1024  # tokens per sentence of a tokenizer that is trained here, frame included
# A byte-level vocabulary contains all bytes, so no character is unknown.
BYTES = 256
# Training takes time in the square of a word's length, so longer ones teach nothing.
LONGEST_WORD = 1000  # bytes
# Only texts with such a run can contain one: a character has at most 4 bytes, and a word at most
# one space before it.
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD // 4},}}|\s{{{LONGEST_WORD // 4},}}")
# The tokenizer that this process trained last, by its origin: a pipeline trains one for all stages.
_LAST: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Section):
    """The tokenizer of sentences.

    Attributes:
      kind: "trained", or a key of PUBLISHED.
      path: the folder of a published tokenizer's files; empty for `trained`.
      vocab: for `trained`: largest number of ids, languages included.
      lower: for `trained`: lower-cases all texts, so outputs are in lower case too.
      max_length: largest number of tokens per sentence, frame included; None for the kind's limit.
    """

    kind: Annotated[str, one_of("trained", *PUBLISHED)] = "trained"
    path: str = ""
    vocab: Size = 2000
    lower: bool = False
    max_length: Size | None = None

    def __post_init__(self):
        super().__post_init__()
        limit = self._most
        if self.max_length is not None and not 3 <= self.max_length <= limit:
            raise FieldError(
                f"max_length={self.max_length} must be from 3 (a frame and a token) to {limit}, "
                f"the limit of {self.kind!r}, or None"
            )
        if self.is_trained and self.vocab <= BYTES + len(SPECIAL) + 1:
            raise FieldError(
                f"vocab={self.vocab} must be above {BYTES + len(SPECIAL) + 1}: {BYTES} bytes, "
                f"{len(SPECIAL)} special tokens, a mask; and the languages"
            )
        if self.lower and not self.is_trained:
            raise FieldError(
                f"lower=True is for kind='trained': {self.kind!r} is published, which fixes "
                "whether texts are lower-cased"
            )
        if (self.path == "") != self.is_trained:
            rule = "must be empty" if self.is_trained else "must be its folder"
            raise FieldError(f"path={shown(self.path)} {rule} for kind={self.kind!r}")

    @property
    def is_trained(self) -> bool:
        """True for a tokenizer that is trained here, on the run's sentences."""
        return self.kind == "trained"

    @property
    def limit(self) -> int:
        """Largest number of tokens per sentence, frame included."""
        return self._most if self.max_length is None else self.max_length

    @property
    def _most(self) -> int:
        return LONGEST if self.is_trained else PUBLISHED[self.kind].limit


def load_tokenizer(
    config: TokenizerConfig,
    *,
    key: str = "config.tokenizer",
    sentences: Iterable[str] | None = None,
    languages: Sequence[str] = (),
    path: os.PathLike | str | None = None,
) -> Tokenizer:
    """Loads the tokenizer of `config`; downloads nothing.

    Args:
      config: the tokenizer's section.
      key: path of that section, for messages.
      sentences, languages, path: for `trained`: see `load_or_train_tokenizer`.

    Raises:
      FileNotFoundError: the folder lacks the files of the kind.
      ValueError: its files are not a tokenizer of the kind.
    """
    if not config.is_trained:
        return load_published(config.kind, config.path, limit=config.limit, key=key)
    assert path is not None, "a trained tokenizer needs a file"
    return load_or_train_tokenizer(config, sentences, languages, path)


def encode_corpus(
    tokenizer: Tokenizer,
    corpus: Corpus,
    language: str,
    *,
    frame: str | None,
    folder: os.PathLike | str,
) -> Ragged:
    """Returns the ids of a corpus's sentences in one language.

    For LARGE corpora they are memory-mapped from a file in `folder`, whose name contains a
    fingerprint of texts and tokenizer. If it is missing or damaged, the first host writes it while
    the others wait; a host that does not see that file writes its own. Separate runs may write the
    same file at the same time: each replaces it atomically. In a bucket no files are written.

    Args:
      tokenizer: the tokenizer.
      corpus: the sentences.
      language: language of the sentences.
      frame: language of the frame; None for a text tower's frame.
      folder: created if missing.

    Raises:
      ValueError: as `Tokenizer.encode`.
    """
    texts = corpus.texts[language]
    if len(texts) < LARGE or in_bucket(folder):  # a file in a bucket cannot be memory-mapped
        return tokenizer.encode(texts, frame)
    texts = texts if isinstance(texts, Lines) else Lines.of(texts)
    digest = hashlib.sha256(f"ids 1 {tokenizer.fingerprint(frame)}".encode())
    for array in (texts.utf8.lengths, texts.utf8.starts, texts.utf8.flat):
        digest.update(np.ascontiguousarray(array).data)
    # Part of the name, so that no run replaces a file that another one is reading.
    fingerprint = digest.hexdigest()
    path = epath.Path(folder) / f"{corpus.slug}.{language}.{fingerprint[:16]}.ids.npz"
    make = functools.partial(_write_ids, path, fingerprint, tokenizer, texts, frame)
    ids, refusal = None, None
    if jax.process_index() == 0:
        try:
            ids = _read_ids(path, fingerprint) or make()
        except ValueError as error:
            refusal = error
    elsewhere = ValueError(f"{corpus.name}, {language}, is refused; process 0 says why")
    hosts.raise_everywhere(refusal, elsewhere)
    return ids or _read_ids(path, fingerprint) or make()


def _read_ids(path: epath.Path, fingerprint: str) -> Ragged | None:
    """Returns the ids in an intact file with this fingerprint, else None; the log says why."""
    if not path.exists():
        return None
    try:
        kinds = {"lengths": (np.int32, 1), "ids": (np.int32, 1)}
        stored, arrays = read_arrays(path, kinds, mapped=True)
        ids = Ragged.of(arrays["ids"], arrays["lengths"])
        if stored != fingerprint or ids.lengths.min() < 1 or ids.lengths.sum() != len(ids.flat):
            raise ValueError(f"{path} is damaged (its arrays do not fit each other or its name)")
    except (OSError, ValueError) as error:
        logging.warning("%s; recomputing the ids", error)
        return None
    return ids


def _write_ids(
    path: epath.Path, fingerprint: str, tokenizer: Tokenizer, texts: Lines, frame: str | None
) -> Ragged:
    start = time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # An npz entry starts with the array's size, so ids are spooled to disk until all are known.
        with tempfile.TemporaryFile(dir=path.parent) as file:
            lengths = []
            for ids, counts in tokenizer.encode_parts(texts, frame):
                file.write(ids)
                lengths.append(counts)
            file.flush()
            arrays = {"lengths": np.concatenate(lengths), "ids": np.memmap(file, np.int32, "r")}
            write_arrays(path, fingerprint, arrays)
    except OSError as error:
        logging.warning(
            "%s cannot be written (%s): its ids stay in memory and are recomputed at every start; "
            "free some space there, or set config.features to another folder",
            *(path, error),
        )
        return tokenizer.encode(texts, frame)
    seconds = time.perf_counter() - start
    logging.info("%s: %d sentences encoded in %.0f s", path, len(texts), seconds)
    return _read_ids(path, fingerprint) or tokenizer.encode(texts, frame)


def load_or_train_tokenizer(
    config: TokenizerConfig,
    sentences: Iterable[str] | None,
    languages: Sequence[str],
    path: os.PathLike | str,
) -> FramedTokenizer:
    """Loads the tokenizer in the file `path`, or trains it and writes that file.

    It is a byte-level BPE, so decoding restores any text exactly. Ids are <s>, <pad>, </s>, <unk>,
    the pieces, the languages in order, and <mask>. The same sentences give the same ids in every
    process.

    Args:
      config: the tokenizer's section.
      sentences: training sentences in all languages together; None if the file exists.
      languages: languages that get a token.
      path: a JSON file.

    Raises:
      FileNotFoundError: there is neither the file nor sentences.
      ValueError: the file belongs to other sentences, languages or size, or is damaged.
    """
    path, languages = epath.Path(path), tuple(languages)
    if sentences is not None:
        sentences = sentences if isinstance(sentences, Chain) else list(sentences)
    origin = _origin(config, sentences, languages)
    if not path.exists():
        if sentences is None:
            raise FileNotFoundError(f"{path} is missing and there is nothing to train it on")
        if (key := json.dumps(origin)) not in _LAST:
            trained = _train(config, sentences, languages)
            _LAST.clear()
            _LAST[key] = trained
        record = {"made_from": origin, "bpe": _LAST[key]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps(record, ensure_ascii=False).encode())
    made_from, tokenizer = _read(path)
    made_from = {"lower": False} | made_from  # missing in files of earlier versions
    expected = {"lower": config.lower} | origin
    if changed := [key for key in expected if expected[key] != made_from.get(key)]:
        changes = ", ".join(
            f"{key} {plain(repr(made_from.get(key)))} not {expected[key]!r}" for key in changed
        )
        raise ValueError(
            f"{path} was made from other input: {changes}; remove it to train it again, or restore "
            "the config"
        )
    # `_read` builds the tokenizer from vocabulary and merges alone.
    if config.lower:
        tokenizer.normalizer = normalizers.Lowercase()
    return _add_frame(tokenizer, languages, config.limit)


def _read(path: epath.Path) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """Returns a trained tokenizer, preceded by the record of what it was made from.

    Raises:
      ValueError: the file was not written by `_train`.
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
    config: TokenizerConfig, sentences: Sequence[str] | None, languages: tuple[str, ...]
) -> dict:
    """Returns the record of what a tokenizer is made from, with its sentences as a checksum."""
    origin: dict = {"vocab": config.vocab, "languages": list(languages)}
    if config.lower:  # otherwise left out, so that files of earlier versions still match
        origin["lower"] = True
    if sentences is not None:
        origin["sentences"] = functools.reduce(
            lambda checksum, piece: zlib.crc32(piece, checksum), joined(sentences), 0
        )
    return origin


def _train(config: TokenizerConfig, sentences: Sequence[str], languages: tuple[str, ...]) -> str:
    """Returns the JSON of a tokenizer trained on the sentences, without words that are too long."""
    # Languages and a mask follow the pieces, see `_add_frame`.
    room = config.vocab - len(languages) - 1
    if room < BYTES + len(SPECIAL):
        raise ValueError(
            f"config.tokenizer.vocab={config.vocab} is too small for {BYTES} bytes, {len(SPECIAL)} "
            f"special tokens, {len(languages)} languages and a mask"
        )
    # Training locks its tokenizer, so another one looks for long words.
    tokenizer, splitter = (byte_pairs.byte_level(models.BPE()) for _ in range(2))
    if config.lower:
        tokenizer.normalizer, splitter.normalizer = normalizers.Lowercase(), normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    left_out = 0

    def parts() -> Iterator[str]:
        nonlocal left_out
        for text in sentences:
            kept = _without_long_words(splitter, _add_space(text))
            left_out += len(kept) - 1
            yield from kept

    logging.info("training the tokenizer on %d sentences", len(sentences))
    tokenizer.train_from_iterator(parts(), trainer)
    if left_out:
        logging.warning(
            "the tokenizer was trained without words above %d bytes, such as lines without spaces; "
            "config.data has %d of them",
            *(LONGEST_WORD, left_out),
        )
    logging.info(
        "trained a tokenizer of %d pieces on %d sentences",
        tokenizer.get_vocab_size(),
        len(sentences),
    )
    return tokenizer.to_str()


def _without_long_words(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    """Returns the parts of a text between words above LONGEST_WORD; [text] if there are none."""
    if not LONG_RUN.search(text):
        return [text]
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    parts, start = [], 0
    for word, (first, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text):
        if len(word) > LONGEST_WORD:  # it has a character per byte
            parts.append(text[start:first])
            start = end
    return [*parts, text[start:]]


def _add_space(text: str) -> str:
    """Adds a space before the text, so that its first word is tokenised like the others."""
    return f" {text}" if text else ""


def _add_frame(
    tokenizer: tokenizers.Tokenizer, languages: tuple[str, ...], limit: int
) -> FramedTokenizer:
    pieces = tokenizer.get_vocab_size()
    vocab = pieces + len(languages) + 1

    def cut(texts: list[str]) -> list[list[int]]:
        encodings = tokenizer.encode_batch_fast(  # skips offsets into the text
            [_add_space(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    return FramedTokenizer(
        cut=cut,
        join=lambda ids: tokenizer.decode(ids, skip_special_tokens=False).removeprefix(" "),
        definition=functools.partial(byte_pairs.define, tokenizer),
        vocab=vocab,
        language_ids={language: pieces + i for i, language in enumerate(languages)},
        special=frozenset({*range(len(SPECIAL)), *range(pieces, vocab)}),
        limit=limit,
    )
