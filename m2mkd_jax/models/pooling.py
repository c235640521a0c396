"""Pooling of a ViT's tokens into the features that its head classifies."""

import types
from collections.abc import Callable, Mapping

from jax import numpy as jnp
from jaxtyping import Array, Float

Pool = Callable[[Float[Array, "B T D"], Float[Array, "B S D"]], Float[Array, "B _"]]

ATTENTION = "attention"  # `common_jax.nn.pooling.AttentionPool`

# Functions of all tokens, which start with the class token if there is one, and of the patches.
POOLS: Mapping[str, Pool] = types.MappingProxyType(
    {
        "class": lambda tokens, patches: tokens[:, 0],
        "mean": lambda tokens, patches: patches.mean(axis=1),
        # DINOv2's linear classifier.
        "class_and_mean": lambda tokens, patches: jnp.concatenate(
            [tokens[:, 0], patches.mean(axis=1)], axis=-1
        ),
    }
)
