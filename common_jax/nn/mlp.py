"""The transformer's two-layer MLP."""

import functools
import math
import types
from collections.abc import Callable, Mapping

import jax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.nn import dense

INIT = nn.initializers.normal(0.02)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x (1 + erf(x / sqrt 2)) / 2.

    jax's own uses erfc, which takes three times as many operations. The results differ only for x
    so far below 0 that the result is about 1e-7 of x or less.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of the GELU, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), OpenAI's approximation of the GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = types.MappingProxyType(
    {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}
)


class Mlp(nn.Module):
    """down(activation(up(x))); `up/kernel` (D, F), `down/kernel` (F, D), both with bias."""

    hidden: int
    dtype: DTypeLike
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        layer = functools.partial(
            nn.Dense, kernel_init=INIT, dtype=self.dtype, dot_general=dense.product
        )
        hidden = self.activation(layer(self.hidden, name="up")(x))
        return layer(x.shape[-1], name="down")(hidden)
