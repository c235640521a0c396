"""Layer normalisation that stores little for the backward pass."""

from flax import linen as nn
from jax.typing import DTypeLike

_LayerNorm = nn.remat(nn.LayerNorm)


def layer_norm(
    epsilon: float, dtype: DTypeLike, name: str | None = None, *, fast_variance: bool = False
) -> nn.LayerNorm:
    """flax's LayerNorm over the last axis, with statistics in float32 for any `dtype`.

    It keeps its input for the backward pass, which computes the rest again: three arrays in
    float32, each twice as large as an input in bfloat16.

    Args:
      epsilon: added to the variance.
      dtype: of the result.
      name: None in `setup`.
      fast_variance: takes E[x^2] - E[x]^2 as the variance, which cancels where the mean is large
        against the spread.
    """
    return _LayerNorm(epsilon, use_fast_variance=fast_variance, dtype=dtype, name=name)
