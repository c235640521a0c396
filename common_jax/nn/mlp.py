"""The transformer's two-layer perceptron."""

from collections.abc import Callable

import jax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

INIT = nn.initializers.normal(0.02)


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU."""
    return nn.gelu(x, approximate=False)


class Mlp(nn.Module):
    """down(activation(up(x))); `up/kernel` (D, F), `down/kernel` (F, D), both with bias."""

    hidden: int
    dtype: DTypeLike
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        hidden = nn.Dense(self.hidden, kernel_init=INIT, dtype=self.dtype, name="up")(x)
        hidden = self.activation(hidden)
        return nn.Dense(x.shape[-1], kernel_init=INIT, dtype=self.dtype, name="down")(hidden)
