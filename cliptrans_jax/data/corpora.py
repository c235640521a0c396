"""Where sentences and pictures come from: the embedded emoji, Multi30k, WIT, WMT or COCO."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cliptrans_jax.data import emoji_set, layouts
from cliptrans_jax.data.corpus import Corpus
from common_jax.config import did_you_mean


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`config.data`: the sentences and pictures of a run.

    Attributes:
      source: a key of SOURCES.
      path: the folder of the source; `emoji` has none.
      source_language, target_language: two codes that the source has, such as "en" and "de";
        `coco` has the first alone.
      train_split, valid_split, test_split: as the source calls them: train, val, test for `emoji`;
        train, val, test_2016_flickr and so on for `multi30k`; train, valid, test for `wit`; names
        of files for `wmt`; train2017, val2017 and so on for `coco`.
      workers: processes that read and prepare pictures; 0 does it in the training thread.
      bad_share: share of the pictures that may be unreadable before the run stops.
      emoji_size: side in pixels that emoji are drawn at.
      emoji_flags: whether countries' flags are among the emoji. Their names are proper nouns, and
        a network that has not seen one can guess it from neither picture nor text.
    """

    source: str = "emoji"
    path: str = ""
    source_language: str = "en"
    target_language: str = "de"
    train_split: str = "train"
    valid_split: str = "val"
    test_split: str = "test"
    workers: int = 0
    bad_share: float = 0.0
    emoji_size: int = 48
    emoji_flags: bool = False

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(
                f"config.data.source={self.source!r} is none of {sorted(SOURCES)}"
                f"{did_you_mean(self.source, SOURCES)}"
            )
        if (self.path == "") != (self.source == "emoji"):
            rule = "must be empty" if self.source == "emoji" else "must be its folder"
            raise ValueError(
                f"config.data.path={self.path!r} {rule} for config.data.source={self.source!r}"
            )
        for key in ("source_language", "target_language"):
            _require_language(self.source, getattr(self, key), key=f"config.data.{key}")
        if self.source_language == self.target_language:
            raise ValueError(
                f"config.data.target_language={self.target_language!r} must be another language "
                "than config.data.source_language"
            )
        for key in ("train_split", "valid_split", "test_split"):
            if not getattr(self, key):
                raise ValueError(f"config.data.{key} must name a split and is empty")
        if not 0 <= self.bad_share < 1:
            raise ValueError(f"config.data.bad_share={self.bad_share} must be in [0, 1)")
        if self.workers < 0:
            raise ValueError(f"config.data.workers={self.workers} must be 0 (none) or more")
        if self.emoji_size < 1:
            raise ValueError(f"config.data.emoji_size={self.emoji_size} must be at least 1")

    @property
    def pair(self) -> tuple[str, str]:
        """(source language, target language)."""
        return self.source_language, self.target_language


def load_corpus(
    config: DataConfig, split: str, languages: Sequence[str], *, with_images: bool = False
) -> Corpus:
    """The examples of a split in some languages.

    Args:
      split: as the source calls it.
      languages: what to read, at least one. `wit`, `wmt` and `coco` hold those of `config.pair`
        alone.
      with_images: open the pictures too; `wit` then leaves out the examples that have none. Where
        a source has no pictures, `Corpus.require_images` says why.

    Raises:
      FileNotFoundError: a file or folder that is not there, with what is.
      ValueError: an unknown split or language; files that do not fit each other.
    """
    assert languages, "no language asked for"
    for language in languages:
        _require_language(config.source, language, key="language")
        if config.source in PAIRED and language not in config.pair:
            raise ValueError(
                f"language {language!r} is not of the pair {config.pair} of "
                f"config.data.source={config.source!r}; set config.data.source_language or "
                "config.data.target_language to it"
            )
    return SOURCES[config.source](config, split, tuple(languages), with_images)


def _require_language(source: str, language: str, *, key: str) -> None:
    known = LANGUAGES.get(source)
    if known is not None and language not in known:
        raise ValueError(
            f"{key}={language!r} is no language of config.data.source={source!r}, which has "
            f"{', '.join(known)}{did_you_mean(language, list(known))}"
        )


def _load_emoji(
    config: DataConfig, split: str, languages: tuple[str, ...], with_images: bool
) -> Corpus:
    return emoji_set.load_emoji(
        split,
        languages,
        size=config.emoji_size if with_images else None,
        flags=config.emoji_flags,
    )


def _load_multi30k(
    config: DataConfig, split: str, languages: tuple[str, ...], with_images: bool
) -> Corpus:
    return layouts.load_multi30k(_root(config), split, languages, with_images=with_images)


def _load_wit(
    config: DataConfig, split: str, languages: tuple[str, ...], with_images: bool
) -> Corpus:
    return layouts.load_wit(
        _root(config), split, languages, pair=config.pair, with_images=with_images
    )


def _load_wmt(
    config: DataConfig, split: str, languages: tuple[str, ...], with_images: bool
) -> Corpus:
    del with_images  # the corpus says why it has none
    return layouts.load_wmt(_root(config), split, languages, pair=config.pair)


def _load_coco(
    config: DataConfig, split: str, languages: tuple[str, ...], with_images: bool
) -> Corpus:
    return layouts.load_coco(
        _root(config), split, languages, language=config.source_language, with_images=with_images
    )


def _root(config: DataConfig) -> Path:
    root = Path(os.path.expanduser(config.path))
    if not root.is_dir():
        raise FileNotFoundError(
            f"config.data.path={config.path!r} is no folder; give the one that holds "
            f"{config.source}'s files"
        )
    return root


SOURCES: Mapping[str, Callable[[DataConfig, str, tuple[str, ...], bool], Corpus]] = {
    "emoji": _load_emoji,
    "multi30k": _load_multi30k,
    "wit": _load_wit,
    "wmt": _load_wmt,
    "coco": _load_coco,
}

# What is known beforehand; WMT has whatever folders there are.
LANGUAGES: Mapping[str, tuple[str, ...]] = {
    "emoji": emoji_set.LANGUAGES,
    "multi30k": layouts.MULTI30K_LANGUAGES,
    "wit": layouts.WIT_LANGUAGES,
}
PAIRED = ("wit", "wmt", "coco")
