"""The sources of sentences and pictures: the built-in emoji, Multi30k, WIT, WMT, COCO and a user's
own files."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from cliptrans_jax.data import emoji_set, layouts, own
from cliptrans_jax.data.corpus import Corpus
from common_jax.config import FieldError, Section, did_you_mean
from common_jax.inputs.names import naming_path
from common_jax.ranges import BelowOne, Count, Name, Size, key_of, shown

Languages = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """`config.data`: the sentences and pictures of a run.

    Attributes:
      source: a key of SOURCES.
      path: folder of the source; for `table` also a single file; `emoji` has none.
      source_language, target_language: two language codes of the source, such as "en" and "de";
        `coco` only uses the first.
      train_split, valid_split, test_split: names of splits in the source: train, val, test for
        `emoji`; train, val, test_2016_flickr and so on for `multi30k`; train, valid, test for
        `wit`; names of files for `wmt` and `text`, and for `table` too, or those in the column
        `split` of one file; train2017, val2017 and so on for `coco`.
      further_tests: splits to translate and score in addition to test_split; `emoji` has
        compositions, to be used with train_split rest.
      workers: processes that load and preprocess pictures; 0 does it in the training process.
      bad_share: share of pictures that may be unreadable before the run stops.
      emoji_size: side in pixels at which emoji are drawn.
      emoji_flags: whether to include country flags. Their names are proper nouns, which a network
        cannot guess from picture or text unless it was trained on them.
    """

    source: Annotated[str, key_of(lambda: SOURCES)] = "emoji"
    path: str = ""
    source_language: Name = "en"
    target_language: Name = "de"
    train_split: Name = "train"
    valid_split: Name = "val"
    test_split: Name = "test"
    further_tests: tuple[Name, ...] = ()
    workers: Count = 0
    bad_share: BelowOne = 0.0
    emoji_size: Size = 32
    emoji_flags: bool = False

    def __post_init__(self):
        super().__post_init__()
        source = SOURCES[self.source]
        # Otherwise only scores that are too good would show that a run has seen its test set.
        for split in (self.valid_split, self.test_split, *self.further_tests):
            whole, rest = source.parts.get(split, (None, None))
            if self.train_split == whole:
                raise FieldError(
                    f"train_split={whole!r} contains the split {split!r}, so training would "
                    f"include these test examples; set train_split={rest!r}"
                )
        if (self.path == "") != source.built_in:
            rule, hint = "must be its folder", ""
            if source.built_in:
                rule, hint = "must be empty", "; for your own data set source to 'table' or 'text'"
            raise FieldError(f"path={shown(self.path)} {rule} for source={self.source!r}{hint}")
        for key in ("source_language", "target_language"):
            if problem := _language_problem(self.source, getattr(self, key)):
                raise FieldError(f"{key}={problem}")
        if self.source_language == self.target_language:
            raise FieldError(
                f"target_language={self.target_language!r} must be another language than "
                "source_language"
            )

    @property
    def pair(self) -> tuple[str, str]:
        """(source language, target language)."""
        return self.source_language, self.target_language

    @property
    def further(self) -> dict[str, str]:
        """`further_tests` by the folder of their scores in a run, which also prefixes their
        metrics."""
        return {f"test_{split}": split for split in self.further_tests}

    @property
    def trained_on(self) -> dict[str, str]:
        """By field: warnings that it names the training split, to see whether a network fits it."""
        scored = {"valid_split": (self.valid_split,), "test_split": (self.test_split,)}
        scored["further_tests"] = self.further_tests
        return {
            field: f"config.data.{field}={getattr(self, field)!r} is also the training split: its "
            "scores are of sentences that the run has trained on"
            for field, splits in scored.items()
            if self.train_split in splits
        }


def load_corpus(
    config: DataConfig, split: str, languages: Sequence[str], *, with_images: bool = False
) -> Corpus:
    """Loads a split in the given languages.

    Args:
      config: config.data.
      split: name of the split in the source.
      languages: languages to read, at least one. `wit`, `wmt` and `coco` have only those in
        `config.pair`.
      with_images: also opens the pictures; `wit` then leaves out examples without one. If a source
        has no pictures, `Corpus.require_images` gives the reason.

    Raises:
      FileNotFoundError: a file or folder is missing; the message lists those present.
      OSError: a file or folder cannot be read.
      ValueError: an unknown split or language; files that do not match each other.
    """
    assert languages, "no language is requested"
    source = SOURCES[config.source]
    for language in languages:
        if problem := _language_problem(config.source, language):
            raise ValueError(f"language={problem}")
        if source.paired and language not in config.pair:
            raise ValueError(
                f"language {language!r} is not of the pair {config.pair} of "
                f"config.data.source={config.source!r}; leave it out of config.languages, or set "
                "config.data.source_language or config.data.target_language to it"
            )
    with naming_path(config.path):
        return source.load(config, split, tuple(languages), with_images)


def _language_problem(source: str, language: str) -> str | None:
    """Says why a source cannot have a language; None if it can."""
    known = SOURCES[source].languages
    if known is None or language in known:
        return None
    return (
        f"{shown(language)} is not a language of config.data.source={source!r}, which has "
        f"{', '.join(known)}{did_you_mean(language, known)}; your own data takes any, by the flags "
        "--config.data.source_language and --config.data.target_language"
    )


def _load_emoji(config: DataConfig, split: str, languages: Languages, images: bool) -> Corpus:
    size = config.emoji_size if images else None
    return emoji_set.load_emoji(split, languages, size=size, flags=config.emoji_flags)


def _load_multi30k(config: DataConfig, split: str, languages: Languages, images: bool) -> Corpus:
    return layouts.load_multi30k(_root(config), split, languages, with_images=images)


def _load_wit(config: DataConfig, split: str, languages: Languages, images: bool) -> Corpus:
    root, pair = _root(config), config.pair
    return layouts.load_wit(root, split, languages, pair=pair, with_images=images)


def _load_wmt(config: DataConfig, split: str, languages: Languages, images: bool) -> Corpus:
    # It has no images, and says so itself.
    return layouts.load_wmt(_root(config), split, languages, pair=config.pair)


def _load_coco(config: DataConfig, split: str, languages: Languages, images: bool) -> Corpus:
    root, language = _root(config), config.source_language
    return layouts.load_coco(root, split, languages, language=language, with_images=images)


def _load_text(config: DataConfig, split: str, languages: Languages, images: bool) -> Corpus:
    return own.load_text(_root(config), split, languages, with_images=images)


def _load_table(config: DataConfig, split: str, languages: Languages, images: bool) -> Corpus:
    path = Path(os.path.expanduser(config.path))
    root = path if path.is_file() else _root(config)
    return own.load_table(root, split, languages, with_images=images)


def _root(config: DataConfig) -> Path:
    root = Path(os.path.expanduser(config.path))
    if not root.is_dir():
        raise FileNotFoundError(
            f"config.data.path={config.path!r} is not a folder; give the one with "
            f"{config.source}'s files"
        )
    return root


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of sentences and pictures.

    Attributes:
      load: (config, split, languages, whether to open pictures) -> the corpus.
      languages: those that it has; None for whatever its files contain.
      paired: whether it can only be read in the two languages of `DataConfig.pair`.
      built_in: whether it comes with the code, without a folder.
      parts: test split -> (a split that contains it, the rest of that split).
      notice: the attribution that it requires of a published model; "" for none.
    """

    load: Callable[[DataConfig, str, Languages, bool], Corpus]
    languages: Languages | None = None
    paired: bool = False
    built_in: bool = False
    parts: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    notice: str = ""


SOURCES: Mapping[str, Source] = {
    "emoji": Source(
        _load_emoji,
        languages=emoji_set.LANGUAGES,
        built_in=True,
        parts={"compositions": ("train", "rest")},
        notice="The pictures of the emoji are from [OpenMoji](https://openmoji.org), CC BY-SA 4.0.",
    ),
    "multi30k": Source(_load_multi30k, languages=layouts.MULTI30K_LANGUAGES),
    "wit": Source(_load_wit, languages=layouts.WIT_LANGUAGES, paired=True),
    "wmt": Source(_load_wmt, paired=True),
    "coco": Source(_load_coco, paired=True),
    "text": Source(_load_text),
    "table": Source(_load_table),
}
