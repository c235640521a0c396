"""The bundled emoji: names, pictures, and no variants of test emoji in the training set."""

import collections
import unicodedata

import emoji as package
import numpy as np
import pytest

from cliptrans_jax.data import emoji_set
from cliptrans_jax.data.corpora import DataConfig, load_corpus
from cliptrans_jax.data.corpus import Images
from cliptrans_jax.data.emoji_set import LANGUAGES, SPLITS, base, groups, load_emoji, splits

WHOLE = ("train", "val", "test")  # splits of whole groups, which together have every emoji once


@pytest.fixture(scope="module")
def corpora():
    return {split: load_emoji(split, LANGUAGES, flags=True) for split in WHOLE}


def test_splits_have_the_documented_sizes():
    found = {}
    for split in SPLITS:
        corpus = load_emoji(split, ("en",))
        found[split] = (len(corpus), emoji_set.count_groups(corpus.keys))
    assert found == {
        "train": (2943, 1126),
        "val": (385, 152),
        "test": (354, 152),
        "compositions": (202, 77),
        "rest": (2741, 1121),
    }


def test_compositions_and_rest_partition_the_training_split(corpora):
    parts = [load_emoji(split, LANGUAGES, flags=True).keys for split in ("compositions", "rest")]
    assert not set(parts[0]) & set(parts[1])
    assert set(parts[0]) | set(parts[1]) == set(corpora["train"].keys)
    assert not any(map(emoji_set.is_flag, parts[0]))


@pytest.mark.parametrize("language", LANGUAGES)
def test_compositions_are_new_names_of_known_words(language):
    chosen, rest = (load_emoji(x, (language,)).texts[language] for x in ("compositions", "rest"))
    assert not set(chosen) & set(rest) and len(set(chosen)) == len(chosen)
    if language in ("ja", "zh"):  # by character, for lack of spaces
        chosen, rest = (["".join(name.split()) for name in names] for names in (chosen, rest))
        assert {letter for name in chosen for letter in name} <= set("".join(rest))
    else:
        known = {word for name in rest for word in name.split()}
        assert {word for name in chosen for word in name.split()} <= known


def test_compositions_have_several_words():
    names = load_emoji("compositions", ("en",)).texts["en"]
    assert all(len(name.split()) > 1 for name in names)
    assert {"man firefighter", "ear dark skin tone"} <= set(names)


def test_test_splits_are_named_after_what_is_new():
    names = [load_emoji(split, ("en",)).name for split in ("test", "compositions")]
    assert names == ["emoji test of new words", "emoji test of new compositions"]


def test_splits_share_no_group_or_name(corpora):
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        keys, others = corpora[one].keys, corpora[other].keys
        assert not set(keys) & set(others)
        assert not {groups()[e] for e in keys} & {groups()[e] for e in others}
        assert not {base(e) for e in keys} & {base(e) for e in others}
        for language in LANGUAGES:
            names = set(corpora[one].texts[language]) & set(corpora[other].texts[language])
            assert not names, (one, other, language)
    assert sum(map(len, corpora.values())) == len(groups()) == 3944


@pytest.mark.parametrize(
    "variants",
    [
        "👋👋🏻👋🏿",
        "👨‍🚀 👩‍🚀 🧑‍🚀 👩🏽‍🚀",
        "👨 👩 🧑 👱 👱‍♀️ 👨‍🦰 🧔🏿‍♂️ 👦🏻 👧 🧒",
        "🏃 🏃‍♀️ 🏃‍➡️ 🏃🏻‍♂️‍➡️",
        "💃 🕺🏿",
        "👫 👬🏻 👭 🧑‍🤝‍🧑 👩🏿‍🤝‍👨🏻",
        "💏 👨‍❤️‍💋‍👨 👩🏻‍❤️‍💋‍👨🏿",
        "👪 👨‍👩‍👧‍👦 👩‍👦",
        "🤝 🫱🏻‍🫲🏿",
        "🤰 🫃 🫄🏽",
        "👯 👯‍♂️",
        "🤼 🤼‍♀️",
    ],
)
def test_variants_share_a_group(variants):
    found = [e["emoji"] for e in package.emoji_list(variants)]
    assert len(found) >= 2
    assert len({groups()[e] for e in found}) == 1, found


def test_distinct_emoji_have_groups_of_their_own():
    apart = "😀 😃 1️⃣ 2️⃣ 🔟 🇩🇪 🇫🇷 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🏴 👨 👶 ♀️ ♂️ ➡️ 👞 👠 🐱 🐈 🍎 🍏"
    found = [e["emoji"] for e in package.emoji_list(apart)]
    assert len(found) == 20
    assert len({groups()[e] for e in found}) == len(found)


def test_large_groups_are_in_the_training_split():
    sizes = collections.Counter(groups().values())
    large = [e for e in groups() if sizes[groups()[e]] > emoji_set.LARGEST_OUTSIDE_TRAIN]
    assert len(large) > 500
    assert {splits()[e] for e in large} == {"train"}


def test_flags_are_excluded_by_default(corpora):
    flags = [e for corpus in corpora.values() for e in corpus.keys if emoji_set.is_flag(e)]
    assert len(flags) == 262
    assert {"🇩🇪", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"} <= set(flags) and not {"🏴", "🏳️‍🌈", "🏁"} & set(flags)
    for split, corpus in corpora.items():
        without = load_emoji(split, ("en",))
        assert without.keys == tuple(e for e in corpus.keys if e not in set(flags))


def test_flags_are_included_if_configured(corpora):
    for flags in (False, True):
        found = load_corpus(DataConfig(emoji_flags=flags), "val", ("en",))
        assert any(map(emoji_set.is_flag, found.keys)) is flags
    assert found.keys == corpora["val"].keys


def test_names_are_plain_text_in_every_language(corpora):
    assert set(LANGUAGES) == set(package.LANGUAGES)
    for corpus in corpora.values():
        for language in LANGUAGES:
            for name in corpus.texts[language]:
                assert name and name == name.strip() and "_" not in name
                assert name[0] != ":" and name[-1] != ":"
                assert unicodedata.is_normalized("NFC", name)
    place = {e: (s, i) for s, corpus in corpora.items() for i, e in enumerate(corpus.keys)}
    split, index = place["😀"]
    shown = {language: corpora[split].texts[language][index] for language in ("en", "de", "zh")}
    assert shown == {"en": "grinning face", "de": "grinsendes gesicht", "zh": "嘿嘿"}


def test_images_are_on_white_and_drawn_once():
    corpus = load_corpus(DataConfig(emoji_size=24), "test", ("en",), with_images=True)
    images = corpus.require_images()
    assert isinstance(images, Images) and len(images) == len(corpus) == 354
    for index in range(0, len(images), 12):
        picture = images[index]
        assert picture.shape == (24, 24, 3) and picture.dtype == np.uint8
        assert picture.std() > 10 and picture[0, 0].min() > 200
        assert images.name(index) == corpus.keys[index]
    assert images[0] is images[0] and not images[0].flags.writeable


def test_images_show_their_emoji():
    red, green, blue = (emoji_set.draw(e, 20)[10, 10].astype(int) for e in "🔴🟢🔵")
    assert red[0] > 200 and red[1] < 120
    assert green[1] > green[0] and green[1] > green[2]
    assert blue[2] > blue[0]
    pale, dark = (emoji_set.draw(e, 20).mean() for e in ("✋🏻", "✋🏿"))
    assert pale > dark + 20


def test_unknown_split_or_language_is_refused():
    with pytest.raises(ValueError, match=r"no split 'tests', only train, val, .* \(did you mean"):
        load_emoji("tests", ("en",))
    with pytest.raises(ValueError, match=r"no language 'cs', only en, es"):
        load_emoji("test", ("cs",))
    with pytest.raises(ValueError, match=r"emoji val has no images: .*with_images=True"):
        load_emoji("val", ("en",)).require_images()
