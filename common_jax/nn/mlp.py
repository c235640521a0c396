"""The transformer's two-layer perceptron."""

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

INIT = nn.initializers.normal(0.02)


class Mlp(nn.Module):
    """down(gelu(up(x))) with the exact (erf) GELU; `up/kernel` (D, F), `down/kernel` (F, D), both
    with bias."""

    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        hidden = nn.Dense(self.hidden, kernel_init=INIT, dtype=self.dtype, name="up")(x)
        hidden = nn.gelu(hidden, approximate=False)
        return nn.Dense(x.shape[-1], kernel_init=INIT, dtype=self.dtype, name="down")(hidden)
