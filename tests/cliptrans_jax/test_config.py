"""The config of a run: defaults, derived values, and errors."""

import dataclasses
import math

import pytest
from jax import numpy as jnp
from tiny_cliptrans import tiny_config

from cliptrans_jax.config import ClipConfig, Config, SourcesConfig
from cliptrans_jax.data.examples import NoiseConfig
from cliptrans_jax.data.feed import BatchingConfig
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.decode import DecodeConfig
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.models.prefix import PrefixConfig
from cliptrans_jax.translators.mbart import MBartConfig


def test_defaults_are_those_of_the_original():
    config = Config()
    assert (config.stage, config.parity, config.precision) == ("translate", False, "float32")
    assert (config.freeze, config.unfreeze_clip, config.all_languages) == ("encoder", False, False)
    assert config.noise == NoiseConfig(mask_prob=1.0, train=False, test=False)
    assert config.batching == BatchingConfig(bucket=16, half_steps=False, window=1)
    assert (config.label_smoothing, config.label_chunk, config.test_side) == (0.0, 1024, "")
    assert (config.valid_decode, config.valid_beams, config.run.best) == (True, 0, "val/bleu")
    assert config.keep_text_features and not config.sources.fetch
    assert config.clip.scale == pytest.approx(1 / 0.07)
    decode = config.decode
    assert (decode.beams, decode.max_new_tokens, decode.length_penalty) == (5, 60, 1.0)
    assert decode.early_stopping and decode.max_length == 61


def test_precision_sets_the_compute_dtype():
    config = tiny_config("translate", None)
    assert config.dtype == jnp.float32
    assert dataclasses.replace(config, precision="bfloat16").dtype == jnp.bfloat16


def sized(*, positions=32, prefix=4, max_length=None, new_tokens=8, vocab=300, **changes):
    """A config of a model with some positions; sentences are cut at `max_length`."""
    config = tiny_config("translate", None)
    mbart = dataclasses.replace(config.model.mbart, positions=positions, vocab=vocab)
    mapper = dataclasses.replace(config.model.mapper, prefix=prefix)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mbart=mbart, mapper=mapper),
        tokenizer=TokenizerConfig(vocab=300, max_length=max_length),
        decode=dataclasses.replace(config.decode, max_new_tokens=new_tokens),
        **changes,
    )


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        ({"max_length": 20}, 20),
        ({}, 28),
        ({"prefix": 0}, 32),
        ({"max_length": 28}, 28),
        ({"positions": 3000}, 1024),
    ],
)
def test_sentence_limit_follows_tokenizer_and_positions(sizes, limit):
    assert sized(**sizes).sentence_limit == limit
    assert sized(**sizes).has_prefix is (sizes.get("prefix") != 0)


@pytest.mark.parametrize(
    ("fits", "longer"),
    [
        ({"max_length": 28}, {"max_length": 29}),
        ({"new_tokens": 27}, {"new_tokens": 28}),  # plus the start token
        ({"max_length": 28}, {"max_length": 28, "prefix": 5}),
        ({"max_length": 28, "positions": 32}, {"max_length": 28, "positions": 31}),
    ],
)
def test_longest_sentence_and_prefix_must_fit_the_positions(fits, longer):
    sized(**fits)
    with pytest.raises(
        ValueError, match=r"^model\.mbart\.positions=3[12] is less than the longest"
    ):
        sized(**longer)
    with pytest.raises(ValueError, match="set tokenizer"):
        sized(**longer)


def test_stage_clip_needs_no_room_for_prefix_or_decoding():
    assert sized(max_length=40, stage="clip").sentence_limit == 28


def test_beams_are_limited_to_half_of_the_vocabulary():
    for fields in ({"decode": DecodeConfig(beams=150, max_new_tokens=8)}, {"valid_beams": 150}):
        dataclasses.replace(sized(), **fields)
    for fields in ({"decode": DecodeConfig(beams=151, max_new_tokens=8)}, {"valid_beams": 151}):
        with pytest.raises(ValueError, match=r"beams=151 must be at most half of .*vocab=300"):
            dataclasses.replace(sized(), **fields)


@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("unfreeze", [False, True])
def test_step_runs_the_text_tower_if_trained_or_not_cached(prefix, keep, unfreeze):
    config = sized(prefix=prefix, keep_text_features=keep, unfreeze_clip=unfreeze)
    assert config.encodes_texts is (prefix > 0 and (unfreeze or not keep))


def test_known_languages_default_to_the_pair():
    assert sized().known_languages == ("en", "de")
    assert sized(languages=("fr", "de", "en")).known_languages == ("fr", "de", "en")


@pytest.mark.parametrize("accumulate", [1, 4])
def test_parity_is_applied_to_the_fields(accumulate):
    """Adam on summed gradients is Adam on their mean with a smaller epsilon."""
    config = sized(parity=True)
    optim = dataclasses.replace(config.optim, batch=8, accumulate=accumulate, eps=1e-6)
    found = dataclasses.replace(config, optim=optim).apply_parity()
    assert math.isclose(found.optim.eps, 1e-6 / accumulate)
    assert found.model.prefix == PrefixConfig(layout="original", mask="original")
    assert found.model.mbart == config.model.mbart and found.test_side == ""
    sgd = dataclasses.replace(optim, optimizer="sgd")
    if accumulate == 1:
        dataclasses.replace(config, optim=sgd)
    else:
        with pytest.raises(
            ValueError, match=r"optim\.accumulate=4 .* optim\.optimizer='sgd' has no"
        ):
            dataclasses.replace(config, optim=sgd)


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({"noise": NoiseConfig(test=True)}, "image"),
        ({"noise": NoiseConfig(test=True), "unfreeze_clip": True}, ""),
        ({"noise": NoiseConfig(test=True), "stage": "triplet"}, ""),
        ({"noise": NoiseConfig(train=True)}, ""),
        ({"test_side": "image", "stage": "triplet"}, "image"),
    ],
)
def test_parity_uses_images_where_the_original_does(changes, side):
    assert dataclasses.replace(sized(parity=True), **changes).apply_parity().test_side == side
    plain = dataclasses.replace(sized(), **changes)
    assert plain.apply_parity() is plain


def test_conflicting_sources_are_refused():
    for fields in (
        {"model": "a", "mbart": "b"},
        {"clip": "a", "clip_image": "b"},
    ):
        with pytest.raises(ValueError, match=r"'a'"):
            SourcesConfig(**fields)
    SourcesConfig(model="a", clip_text="b", clip_image="c")
    SourcesConfig(mbart="a", clip="b", clip_text="c")


def test_locked_text_tower_needs_a_source():
    locked = ClipConfig(lock_text=True)
    for stage in ("clip", "pipeline"):
        with pytest.raises(ValueError, match=r"clip\.lock_text=True needs .* sources\.clip_text"):
            sized(stage=stage, clip=locked)
    sized(stage="translate", clip=locked)
    sized(stage="clip", clip=locked, sources=SourcesConfig(clip_text="tower"))


def test_published_sizes_are_the_defaults():
    assert MBartConfig().positions == 1024 and MapperConfig() == MapperConfig("mlp", 10, 512)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": "captions"}, r"^stage='captions' .*did you mean 'caption'"),
        ({"caption_language": "fr"}, r"^caption_language='fr' must be one of the pair"),
        ({"all_languages": True}, r"^all_languages=True .* not 'translate'"),
        ({"languages": ("en", "fr")}, r"^languages=\('en', 'fr'\) must include the pair"),
        ({"stage": "caption", "unfreeze_clip": True}, r"^unfreeze_clip=True"),
        ({"label_chunk": 0}, r"^label_chunk=0 must be at least 1"),
        ({"valid_beams": -1}, r"^valid_beams=-1 must be at least 0"),
        ({"valid_decode": False}, r"^run\.best='val/bleu' .*val/token_accuracy"),
        ({"freeze": "decoder"}, r"^freeze='decoder'"),
        ({"test_side": "picture"}, r"^test_side='picture'"),
    ],
)
def test_invalid_configs_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(Config(), **changes)
