"""Position tables of a checkpoint, resized to another grid of patches."""

import math

import numpy as np
from jaxtyping import Float

CUBIC = -0.75  # the cubic convolution's free coefficient; jax.image.resize has -0.5 and antialiases


def resize_positions(table: Float[np.ndarray, "1 T D"], tokens: int) -> Float[np.ndarray, "1 T2 D"]:
    """The table for `tokens` tokens: the class token's row kept, the square grid W P W^T.

    Cubic convolution with half-pixel centres, taps outside clamped to the border, no antialiasing
    and no renormalisation, as the original's framework resizes (m2mKD, loading of position
    tables).

    Raises:
      ValueError: when one of the two grids is not a square.
    """
    old, new = (_side(count - 1) for count in (table.shape[1], tokens))
    weights = resize_weights(old, new)
    grid = np.asarray(table[0, 1:], np.float64).reshape(old, old, -1)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(new * new, -1)
    return np.concatenate([table[0, :1], grid.astype(table.dtype)])[None]


def resize_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Row i holds the weights of the `old` places in place i of `new`; equal sizes give the
    identity."""
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        first = math.floor(centre)
        for tap in range(first - 1, first + 3):
            weights[i, min(max(tap, 0), old - 1)] += _cubic(abs(centre - tap))
    return weights


def _cubic(distance: float) -> float:
    if distance <= 1:
        return (CUBIC + 2) * distance**3 - (CUBIC + 3) * distance**2 + 1
    if distance < 2:
        return CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return 0.0


def _side(patches: int) -> int:
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(
            f"a position table of {patches} patches is no square grid and cannot be resized"
        )
    return side
