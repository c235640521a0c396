"""The loss of the stages that train a translator."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import numpy as jnp

from cliptrans_jax.encoders import TextTower
from cliptrans_jax.evaluators.translation import Encode
from cliptrans_jax.losses import states_loss
from cliptrans_jax.models.chunks import CHUNK
from cliptrans_jax.models.cliptrans import TOWER, Translator
from common_jax.step import Loss


def make_encode(tower: TextTower | None) -> Encode:
    """encode(params, batch, dropout=None) -> the features in the batch or, with a text tower, those
    that it computes from the batch's tokens; its parameters are under "clip" in `params`."""

    def encode(
        params: Any, batch: Mapping[str, jax.Array], dropout: jax.Array | None = None
    ) -> jax.Array | None:
        if "clip_tokens" not in batch:
            return batch.get("features")
        assert tower is not None
        return tower.apply(params["clip"], batch["clip_tokens"], dropout=dropout)

    return encode


def make_loss(
    translator: Translator, tower: TextTower | None, *, label_smoothing: float, chunk: int = CHUNK
) -> Loss:
    """The mean label loss over a micro-batch's tokens (CLIPTrans loss). A text tower in the helpers
    is frozen and runs without dropout."""
    pad, encode = translator.config.sizes.pad, make_encode(tower)

    def loss(params, helpers, batch, rngs, step):
        dropout = rngs["dropout"]
        key = jax.random.fold_in(dropout, TOWER) if "clip" in params else None
        features = encode({**helpers, **params}, batch, key)
        source, labels = batch["source"], batch["labels"]
        states = translator.label_states(params, features, source, labels, dropout=dropout)
        # Sums over all devices, so that every token has the same weight on any mesh. The original
        # averages the means of its devices.
        total, count = states_loss(
            translator.readout(params),
            states,
            labels,
            pad=pad,
            smoothing=label_smoothing,
            chunk=chunk,
        )
        return total / jnp.maximum(count, 1), {}

    return loss
