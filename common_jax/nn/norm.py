"""Layer normalisation."""

from flax import linen as nn
from jax.typing import DTypeLike


def layer_norm(
    epsilon: float, dtype: DTypeLike, name: str | None = None, *, fast_variance: bool = False
) -> nn.LayerNorm:
    """flax's LayerNorm over the last axis, with statistics in float32 for any `dtype`.

    Args:
      epsilon: added to the variance.
      dtype: of the result.
      name: None in `setup`.
      fast_variance: takes E[x^2] - E[x]^2 as the variance, which cancels where the mean is large
        against the spread.
    """
    return nn.LayerNorm(epsilon, use_fast_variance=fast_variance, dtype=dtype, name=name)
