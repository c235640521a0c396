"""CLIPTrans' fields that are set but have no effect given the others."""

import dataclasses
import functools

import pytest
from changed import changed
from tiny_cliptrans import tiny_config

from cliptrans_jax.config import Recipe
from cliptrans_jax.data.corpora import DataConfig
from cliptrans_jax.runs.idle import idle, seen_in_training, warn_of_random_parts


def set_all(stage, fields):
    config = functools.reduce(
        lambda config, item: changed(*item, config), fields.items(), tiny_config(stage, None)
    )
    return {path for path in idle(config) if any(x.startswith(path) for x in fields)}


SWITCHED_OFF = [
    ("translate", {"noise.mask_prob": 0.5}, {"noise.train": True}),
    ("translate", {"noise.mask_prob": 0.5}, {"noise.test": True}),
    (
        "translate",
        {"valid_beams": 3, "run.best": "val/token_accuracy", "valid_decode": False},
        {"valid_decode": True},
    ),
    ("translate", {"decode.length_penalty": 0.5, "decode.beams": 1}, {"valid_beams": 2}),
    ("translate", {"decode.length_penalty": 0.5, "decode.beams": 1}, {"decode.beams": 2}),
    ("translate", {"model.nllb.dropout": 0.3}, {"model.translator": "nllb"}),
    ("translate", {"test_side": "image", "model.mapper.prefix": 0}, {"model.mapper.prefix": 2}),
    ("translate", {"sources.fresh": "x"}, {"sources.mbart": "there"}),
    ("translate", {"sources.weights": "ema"}, {"sources.clip_text": "there"}),
    (
        "translate",
        {"keep_text_features": False, "unfreeze_clip": True},
        {"unfreeze_clip": False},
    ),
    ("translate", {"model.mapper.dropout": 0.5}, {"model.mapper.kind": "transformer"}),
    (
        "translate",
        {"model.mapper.features": 16, "model.mapper.prefix": 0},
        {"model.mapper.prefix": 2},
    ),
    (
        "translate",
        {"model.prefix.mask": "original", "model.mapper.prefix": 0},
        {"model.mapper.prefix": 2},
    ),
    ("caption", {"keep_text_features": False}, {"test_side": "text"}),
]


@pytest.mark.parametrize(("stage", "fields", "reads"), SWITCHED_OFF)
def test_ineffective_fields_are_listed_unless_enabled(stage, fields, reads):
    first = next(iter(fields))
    (path,) = set_all(stage, fields)
    assert first.startswith(path)
    assert set_all(stage, fields | reads) == set()


def test_captioning_drops_tokens_whatever_the_noise_config():
    config = changed("noise.train", True, tiny_config("caption", None))
    assert idle(changed("noise.mask_prob", 0.5, config)) == {
        "noise.train": "captioning always drops tokens"
    }


def test_emoji_settings_are_idle_for_other_sources():
    config = tiny_config("translate", None)
    data = DataConfig(source="multi30k", path="there", emoji_size=8, emoji_flags=True)
    assert {*idle(dataclasses.replace(config, data=data))} == {
        "data.emoji_size",
        "data.emoji_flags",
    }
    assert idle(changed("data.emoji_size", 8, config)) == {}


def test_label_smoothing_is_idle_in_the_recipe_of_the_towers():
    recipes = dict.fromkeys(("clip", "caption"), Recipe(label_smoothing=0.1))
    config = dataclasses.replace(tiny_config("pipeline", None), recipes=recipes)
    assert {*idle(config)} == {"recipes.clip.label_smoothing"}


@pytest.mark.parametrize("stage", ["clip", "caption", "translate", "triplet"])
def test_test_configs_have_no_idle_fields(stage):
    assert idle(tiny_config(stage, None)) == {}


@pytest.mark.parametrize(
    ("stage", "freeze", "source", "warns"),
    [
        ("caption", "encoder", "", True),
        ("caption", "nothing", "", False),
        ("caption", "encoder", "mbart", False),
        ("caption", "encoder", "model", False),
        ("translate", "encoder", "", False),
        ("clip", "encoder", "", False),
    ],
)
def test_parts_frozen_at_random_values_give_a_warning(stage, freeze, source, warns, caplog):
    config = changed("freeze", freeze, tiny_config(stage, None))
    config = changed(f"sources.{source or 'clip'}", "there", config)
    warn_of_random_parts(config)
    assert ("freezes the translator's embedding and encoder at random" in caplog.text) == warns


def test_scores_of_the_training_split_are_warned_of():
    def warned(stage, **fields):
        config = tiny_config(stage, None)
        return seen_in_training(changed("data", dataclasses.replace(config.data, **fields), config))

    assert warned("translate") == []
    (said,) = warned("translate", test_split="train")
    assert said == (
        "config.data.test_split='train' is also the training split: its scores are of sentences "
        "that the run has trained on"
    )
    (said,) = warned("clip", valid_split="train", test_split="train")
    assert said.startswith("config.data.valid_split='train' is also")
    (said,) = warned("pipeline", further_tests=("val", "train"))
    assert said.startswith("config.data.further_tests=('val', 'train') is also")
    assert warned("evaluate", test_split="train") == []
