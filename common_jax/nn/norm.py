"""Layer normalisation that stores little for the backward pass."""

from flax import linen as nn
from jax.typing import DTypeLike

# XLA may share the arithmetic of both passes, except in a loop over layers, where it cannot.
_LayerNorm = nn.remat(nn.LayerNorm, prevent_cse=False)


def layer_norm(
    epsilon: float, dtype: DTypeLike, name: str | None = None, *, fast_variance: bool = False
) -> nn.LayerNorm:
    """flax's LayerNorm over the last axis, with statistics in float32 for any `dtype`.

    A loop over layers keeps the input for the backward pass, which computes the rest again. As jax
    derives it, three arrays in float32 were kept.

    Args:
      epsilon: added to the variance.
      dtype: of the result.
      name: None in `setup`.
      fast_variance: takes E[x^2] - E[x]^2 as the variance, which cancels where the mean is large
        against the spread.
    """
    return _LayerNorm(epsilon, use_fast_variance=fast_variance, dtype=dtype, name=name)
