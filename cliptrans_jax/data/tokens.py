"""Sentences as token ids: the published tokenizers of mBART-50, XLM-R and CLIP, and one trained
here.

All frame a sentence alike. With a language it is [language, pieces..., </s>], as mBART has source
and target; without one it is [<s>, pieces..., </s>], as the encoders of CLIP and M-CLIP have it.
"""

import dataclasses
import json
import logging
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from cliptrans_jax.data.framing import SPECIAL, FramedTokenizer, Tokenizer
from common_jax.config import FieldError, Section
from common_jax.ranges import Size, key_of, shown

# Byte-level pieces start from these many, so no character is unknown.
BYTES = 256

MBART50_CODES: Mapping[str, str] = {
    "ar": "ar_AR",
    "cs": "cs_CZ",
    "de": "de_DE",
    "en": "en_XX",
    "es": "es_XX",
    "et": "et_EE",
    "fi": "fi_FI",
    "fr": "fr_XX",
    "gu": "gu_IN",
    "hi": "hi_IN",
    "it": "it_IT",
    "ja": "ja_XX",
    "kk": "kk_KZ",
    "ko": "ko_KR",
    "lt": "lt_LT",
    "lv": "lv_LV",
    "my": "my_MM",
    "ne": "ne_NP",
    "nl": "nl_XX",
    "ro": "ro_RO",
    "ru": "ru_RU",
    "si": "si_LK",
    "tr": "tr_TR",
    "vi": "vi_VN",
    "zh": "zh_CN",
    "af": "af_ZA",
}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Section):
    """How sentences are cut into tokens.

    Attributes:
      kind: a key of KINDS.
      path: the folder of a published tokenizer's files; empty for `trained`.
      vocab: of `trained`: how many ids there are at most, languages and all.
      max_length: tokens a sentence is cut to, frame included; None: as many as the kind takes.
    """

    kind: Annotated[str, key_of(lambda: KINDS)] = "trained"
    path: str = ""
    vocab: Size = 2000
    max_length: Size | None = None

    def __post_init__(self):
        super().__post_init__()
        limit = LIMITS[self.kind]
        if self.max_length is not None and not 3 <= self.max_length <= limit:
            raise FieldError(
                f"max_length={self.max_length} must be from 3 (a frame and a token) to {limit}, "
                f"the most that {self.kind!r} takes, or None"
            )
        if self.kind == "trained" and self.vocab <= BYTES + len(SPECIAL) + 1:
            raise FieldError(
                f"vocab={self.vocab} must be above {BYTES + len(SPECIAL) + 1}: {BYTES} bytes, "
                f"{len(SPECIAL)} special tokens, a mask; and the languages"
            )
        if (self.path == "") != (self.kind == "trained"):
            rule = "must be empty" if self.kind == "trained" else "must be its folder"
            raise FieldError(f"path={shown(self.path)} {rule} for kind={self.kind!r}")

    @property
    def limit(self) -> int:
        """Tokens a sentence may have, frame included."""
        return LIMITS[self.kind] if self.max_length is None else self.max_length


def load_tokenizer(
    config: TokenizerConfig,
    *,
    sentences: Iterable[str] | None = None,
    languages: Sequence[str] = (),
    path: os.PathLike | str | None = None,
) -> Tokenizer:
    """The tokenizer of `config`; nothing is fetched.

    Args:
      sentences, languages, path: of `trained`: see `load_or_train_tokenizer`.

    Raises:
      FileNotFoundError: the folder lacks what the kind needs.
      ValueError: what is there is no tokenizer of the kind.
    """
    return KINDS[config.kind](config, sentences, languages, path)


def load_or_train_tokenizer(
    config: TokenizerConfig,
    sentences: Iterable[str] | None,
    languages: Sequence[str],
    path: os.PathLike | str,
) -> FramedTokenizer:
    """The tokenizer that stands in the file `path`; trained and written there if it does not.

    It merges pairs of bytes (BPE), so that every text comes back as it was, of whatever characters.
    Ids are <s>, <pad>, </s>, <unk>, the pieces, the languages in order and <mask>. The same
    sentences give the same ids, in every process.

    Args:
      sentences: to train on, in all languages together; None takes the file's, which must be there.
      languages: each has a token.
      path: a JSON file.

    Raises:
      FileNotFoundError: no file and no sentences.
      ValueError: the file is of other sentences, languages or size, or is broken.
    """
    path, languages = epath.Path(path), tuple(languages)
    if sentences is not None:
        sentences = list(sentences)
    if not path.exists():
        if sentences is None:
            raise FileNotFoundError(f"{path} is missing and there is nothing to train it on")
        record = _train(config, sentences, languages)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Each process writes a whole file of its own, then puts it in place.
        draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        draft.write_text(json.dumps(record, ensure_ascii=False))
        draft.replace(path)
    try:
        record = json.loads(path.read_text())
        made_from, tokenizer = record["made_from"], tokenizers.Tokenizer.from_str(record["bpe"])
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{path} is no tokenizer of this project ({error}); remove it") from error
    wanted = _origin(config, sentences, languages)
    if differing := [key for key in wanted if wanted[key] != made_from.get(key)]:
        shown = ", ".join(f"{key} {made_from.get(key)!r} not {wanted[key]!r}" for key in differing)
        raise ValueError(
            f"{path} was made from other input: {shown}; remove it to train it anew, or set the "
            "config back"
        )
    return _framed(tokenizer, languages, config.limit)


def _origin(
    config: TokenizerConfig, sentences: list[str] | None, languages: tuple[str, ...]
) -> dict:
    """What a trained tokenizer is made from; sentences as a checksum."""
    origin: dict = {"vocab": config.vocab, "languages": list(languages)}
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
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator((_spaced(text) for text in sentences), trainer)
    logging.info(
        "trained a tokenizer of %d pieces on %d sentences",
        tokenizer.get_vocab_size(),
        len(sentences),
    )
    return {"made_from": _origin(config, sentences, languages), "bpe": tokenizer.to_str()}


def _spaced(text: str) -> str:
    """A space in front, so that the first word is cut as it is inside a sentence."""
    return f" {text}" if text else ""


def _framed(
    tokenizer: tokenizers.Tokenizer, languages: tuple[str, ...], limit: int
) -> FramedTokenizer:
    tokenizer.encode_special_tokens = True  # "</s>" in a sentence is four characters
    pieces = tokenizer.get_vocab_size()
    vocab = pieces + len(languages) + 1

    def cut(texts: list[str]) -> list[list[int]]:
        encodings = tokenizer.encode_batch(
            [_spaced(text) for text in texts], add_special_tokens=False
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


def _trained(
    config: TokenizerConfig,
    sentences: Iterable[str] | None,
    languages: Sequence[str],
    path: os.PathLike | str | None,
) -> FramedTokenizer:
    assert path is not None, "a trained tokenizer has a file"
    return load_or_train_tokenizer(config, sentences, languages, path)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published tokenizer.

    Attributes:
      repository: where its files are on the Hugging Face hub.
      cls: its class in `transformers`.
      files: one of these must be there, and holds all of it.
      codes: language -> its token.
      places: tokens -> their ids, or how many ids from the end for negative ones; other places mean
        that the files are of another tokenizer, to which `transformers` adds what it lacks.
      bos, eos: their tokens.
    """

    repository: str
    cls: str
    files: tuple[str, ...]
    codes: Mapping[str, str]
    places: Mapping[str, int]
    bos: str = "<s>"
    eos: str = "</s>"


FIRST_PLACES = {token: place for place, token in enumerate(SPECIAL)}
PUBLISHED: Mapping[str, Published] = {
    "mbart50": Published(
        "facebook/mbart-large-50",
        "MBart50Tokenizer",
        ("tokenizer.json", "sentencepiece.bpe.model"),
        MBART50_CODES,
        FIRST_PLACES | {"ar_AR": -53, "<mask>": -1},
    ),
    "xlmr": Published(
        "M-CLIP/XLM-Roberta-Large-Vit-B-32",
        "XLMRobertaTokenizer",
        ("tokenizer.json", "sentencepiece.bpe.model"),
        {},
        FIRST_PLACES | {"<mask>": -1},
    ),
    "clip": Published(
        "openai/clip-vit-base-patch32",
        "CLIPTokenizer",
        ("tokenizer.json", "vocab.json"),
        {},
        {"<|startoftext|>": -2, "<|endoftext|>": -1},
        bos="<|startoftext|>",
        eos="<|endoftext|>",
    ),
}


def _published(
    config: TokenizerConfig,
    sentences: Iterable[str] | None,
    languages: Sequence[str],
    path: os.PathLike | str | None,
) -> FramedTokenizer:
    del sentences, path  # it is trained already
    published, folder = PUBLISHED[config.kind], Path(config.path).expanduser()
    if not any((folder / name).is_file() for name in published.files):
        raise FileNotFoundError(
            f"config.tokenizer.path={config.path!r} holds neither {' nor '.join(published.files)}; "
            f"fetch them from {published.repository!r}, for example with "
            f"huggingface_hub.snapshot_download({published.repository!r}, local_dir=...)"
        )
    import transformers

    tokenizer = getattr(transformers, published.cls).from_pretrained(folder, local_files_only=True)
    ids = tokenizer.convert_tokens_to_ids
    known = ids(list(published.places))
    size = len(tokenizer)
    if known != [place % size for place in published.places.values()]:
        found = ", ".join(f"{t} {i}" for t, i in zip(published.places, known, strict=True))
        raise ValueError(
            f"config.tokenizer.path={config.path!r} holds no tokenizer as {published.repository!r} "
            f"has: {found} of {size} ids are not where they belong; fetch its files anew"
        )
    return FramedTokenizer(
        cut=lambda texts: (
            tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        ),
        join=lambda pieces: tokenizer.decode(pieces, clean_up_tokenization_spaces=False),
        vocab=len(tokenizer),
        language_ids={language: ids(code) for language, code in published.codes.items()},
        special=frozenset(tokenizer.all_special_ids),
        limit=config.limit,
        bos=ids(published.bos),
        eos=ids(published.eos),
    )


Loader = Callable[
    [TokenizerConfig, Iterable[str] | None, Sequence[str], os.PathLike | str | None],
    FramedTokenizer,
]
KINDS: Mapping[str, Loader] = {
    "trained": _trained,
    "mbart50": _published,
    "xlmr": _published,
    "clip": _published,
}
# Tokens a sentence may have, as many as the networks have positions for.
LIMITS: Mapping[str, int] = {"trained": 1024, "mbart50": 1024, "xlmr": 512, "clip": 77}
