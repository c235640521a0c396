"""The text side of stage "clip": a tower that trains, or features of a frozen one.

Both have the same interface, so that only one place in the stage depends on the kind.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from cliptrans_jax.config import Config
from cliptrans_jax.data.examples import pad
from cliptrans_jax.models.rules import rules_below
from cliptrans_jax.towers.table import tower_of
from common_jax.mesh import Rules


@dataclasses.dataclass(frozen=True)
class TextSide:
    """The functions of one kind of text side; `params` are all parameters that the stage trains.

    Attributes:
      shapes: (config, B, T) -> shapes of the texts in a batch.
      init: (config, key) -> initial parameters by tower.
      rules: config -> partition rules of these parameters.
      features: (config, params, batch, dropout key or None) -> features (B, M).
      example: (config, T, an item: ids or features) -> the texts of an example.
    """

    shapes: Callable[[Config, int, int], Mapping[str, jax.ShapeDtypeStruct]]
    init: Callable[[Config, jax.Array], dict[str, Any]]
    rules: Callable[[Config], Rules]
    features: Callable[[Config, Any, Any, jax.Array | None], jax.Array]
    example: Callable[[Config, int, np.ndarray], dict[str, np.ndarray]]


def text_side(config: Config) -> TextSide:
    """The text side selected by config.clip.lock_text."""
    return LOCKED if config.clip.lock_text else TRAINED


def _trained_shapes(config: Config, batch: int, length: int):
    return {"ids": jax.ShapeDtypeStruct((batch, length), np.int32)}


def _trained_init(config: Config, key: jax.Array) -> dict[str, Any]:
    sizes = config.clip.text
    return {"text": tower_of(sizes).init(sizes, config.dtype, key)}


def _trained_rules(config: Config) -> Rules:
    return rules_below("text", tower_of(config.clip.text).rules)


def _trained_features(config: Config, params: Any, batch: Any, dropout: jax.Array | None):
    sizes = config.clip.text
    tower = tower_of(sizes)
    return tower.apply(sizes, config.dtype, params["text"], batch["ids"], dropout=dropout)


def _trained_example(config: Config, length: int, ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"ids": pad([ids], length, pad_id=config.clip.text.pad)[0]}


TRAINED = TextSide(
    shapes=_trained_shapes,
    init=_trained_init,
    rules=_trained_rules,
    features=_trained_features,
    example=_trained_example,
)


def _locked_shapes(config: Config, batch: int, length: int):
    shape = (batch, config.clip.image.features)
    return {"features": jax.ShapeDtypeStruct(shape, np.float32)}


# A batch has the features themselves: the tower is no part of the step, and gets no parameters.
LOCKED = TextSide(
    shapes=_locked_shapes,
    init=lambda config, key: {},
    rules=lambda config: (),
    features=lambda config, params, batch, dropout: batch["features"],
    example=lambda config, length, features: {"features": features},
)
