"""Each stage's inputs and trained parameters, and dropped tokens."""

import re

import numpy as np
import pytest
from framed import PAIR, SIZE, TOKENS, choose

from cliptrans_jax.data.examples import (
    NoiseConfig,
    default_caption_language,
    drop_tokens,
    empties_source,
    pad,
)
from cliptrans_jax.stages import FREEZES, STAGES, TRANSLATION_STAGES, Side, trainable
from cliptrans_jax.translators.table import TRANSLATORS


def same(found, expected):
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


@pytest.mark.parametrize(
    ("stage", "train", "test", "captions"),
    [
        ("caption", Side.IMAGE, Side.IMAGE, True),
        ("text_recon", Side.TEXT, Side.TEXT, True),
        ("translate", Side.TEXT, Side.TEXT, False),
        ("triplet", Side.IMAGE, Side.TEXT, False),
    ],
)
def test_source_and_target_of_each_stage(stage, train, test, captions):
    for training, side in ((True, train), (False, test)):
        examples = choose(stage, train=training)
        assert examples.side is side
        assert same(examples.source, TOKENS["en"])
        assert same(examples.target, TOKENS["en" if captions else "de"])
        assert examples.drops is captions
        assert set(examples.languages) == {("en", "en") if captions else PAIR}
        assert list(examples.rows) == list(range(SIZE))
    assert choose(stage, train=False, side=Side.IMAGE).side is Side.IMAGE


@pytest.mark.parametrize("stage", ["translate", "triplet"])
@pytest.mark.parametrize(("train", "test"), [(True, False), (False, True)])
def test_translation_drops_tokens_only_if_configured(stage, train, test):
    noise = NoiseConfig(train=train, test=test)
    assert choose(stage, noise=noise).drops is train
    assert choose(stage, train=False, noise=noise).drops is test


def test_features_are_those_of_the_stage_modality():
    images = np.arange(SIZE * 2, dtype=np.float32).reshape(SIZE, 2)
    texts = {"en": images + 100, "de": images + 200}
    np.testing.assert_array_equal(choose("caption").features(images, {}), images)
    np.testing.assert_array_equal(choose("translate").features(None, texts), texts["en"])
    both = choose("text_recon", all_languages=True).features(None, texts)
    np.testing.assert_array_equal(both, np.concatenate([texts["de"], texts["en"]]))
    both = choose("caption", all_languages=True).features(images, {})
    np.testing.assert_array_equal(both, np.concatenate([images, images]))


@pytest.mark.parametrize(
    ("pair", "language"),
    [(("en", "de"), "en"), (("de", "en"), "en"), (("de", "es"), "es"), (("fr", "de"), "fr")],
)
def test_default_caption_language(pair, language):
    assert default_caption_language(pair) == language


def test_captions_in_a_given_language_and_in_all():
    examples = choose("caption", caption_language="de")
    assert same(examples.source, TOKENS["de"]) and same(examples.target, TOKENS["de"])
    both = choose("text_recon", all_languages=True)
    assert len(both) == 2 * SIZE
    assert same(both.target, [*TOKENS["de"], *TOKENS["en"]])  # the target language first
    assert same(both.source, both.target)
    assert both.languages == (("de", "de"),) * SIZE + (("en", "en"),) * SIZE
    assert list(both.rows) == [*range(SIZE), *range(SIZE)]
    with pytest.raises(ValueError, match=r"config\.all_languages=True is for captioning stages"):
        choose("translate", all_languages=True)


# What is frozen.

PATHS = {
    "mbart/embedding": {"encoder"},
    "mbart/encoder/layer_0/mlp/up/kernel": {"encoder", "encoder_layers"},
    "mbart/encoder/positions/embedding": {"encoder", "encoder_layers"},
    "mbart/logits_bias": {"encoder", "encoder_layers", "nothing"},
    "mbart/decoder/positions/embedding": set(),
    "mbart/decoder/layer_0/attention/qkv/bias": set(),
    "mapper/out/kernel": set(),
    "clip/embeddings/words": set(),
}


@pytest.mark.parametrize("freeze", list(FREEZES))
@pytest.mark.parametrize("stage", list(TRANSLATION_STAGES))
def test_trainable_parameters_of_each_stage(stage, freeze):
    regex = trainable(STAGES[stage], freeze, TRANSLATORS["mbart"])
    for path, holds in PATHS.items():
        held = freeze in holds if STAGES[stage].captioning else path == "mbart/logits_bias"
        assert bool(re.fullmatch(regex, path)) is not held, path


# Dropped tokens.


def test_dropped_tokens_leave_no_gap():
    ids = np.array([90, 11, 12, 13, 14, 2], np.int32)
    draws = np.array([0.0, 0.5, 0.7, 0.69, 0.9, 0.1], np.float32)
    assert drop_tokens(ids, draws, 0.7).tolist() == [90, 14, 2]  # 0.7 itself is not above
    assert drop_tokens(ids, draws, 1.0).tolist() == [90, 2]
    assert drop_tokens(ids, draws, 0.0).tolist() == ids.tolist()
    with pytest.raises(ValueError, match=r"^mask_prob=1\.5 must be in \[0, 1\]"):
        NoiseConfig(mask_prob=1.5)


@pytest.mark.parametrize("stage", list(TRANSLATION_STAGES))
def test_source_is_empty_if_all_tokens_are_dropped(stage):
    captions = STAGES[stage].captioning
    for train in (False, True):
        for prob in (0.99, 1.0):
            noise = NoiseConfig(mask_prob=prob, train=train, test=True)
            assert empties_source(STAGES[stage], noise) is ((captions or train) and prob == 1.0)


def test_overlong_sentence_is_refused():
    assert pad([np.array([5, 6], np.int32)], 4, pad_id=1).tolist() == [[5, 6, 1, 1]]
    with pytest.raises(ValueError, match="has 3 tokens, and there is room for 2; lower max_length"):
        pad([np.arange(3, dtype=np.int32)], 2, pad_id=1)
