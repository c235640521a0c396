"""Stitch layers between the width of a student and the width of the meta model."""

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.nn.mlp import INIT
from common_jax.nn.norm import LayerNorm

NORM_EPS = 1e-5  # not the encoder's 1e-6: the original uses its framework's default here


class Stitch(nn.Module):
    """linear(norm(x)) to `width`, without a residual connection."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T _"]) -> Float[Array, "B T D"]:
        x = LayerNorm(NORM_EPS, self.dtype, name="norm")(x)
        return nn.Dense(self.width, kernel_init=INIT, dtype=self.dtype, name="linear")(x)
