"""Position tables of a checkpoint, resized to another grid of patches."""

import functools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

CUBIC = -0.75  # the cubic convolution's free coefficient; jax.image.resize has -0.5 and antialiases


def resize_positions(
    table: Float[np.ndarray, "1 T D"], rows: int, leading: int = 1
) -> Float[np.ndarray, "1 T2 D"]:
    """The table of `rows` rows: the leading ones kept, the square grid of the patches W P W^T.

    Cubic convolution with half-pixel centres, taps outside clamped to the border, no antialiasing
    and no renormalisation, as the original's framework resizes (m2mKD, loading of position
    tables). So do DINOv2 without registers and SigLIP; timm, and DINOv2 with registers, smooth
    where they shrink.

    Args:
      table: positions of tokens.
      rows: of the table that is asked for, the leading ones among them.
      leading: rows before those of the patches, see `EncoderConfig.leading_positions`. The number
        of rows does not tell them: 201 are 5 + 14^2 or 32 + 13^2.

    Raises:
      ValueError: when one of the two grids is not a square.
    """
    old, new = (_side(count - leading, leading) for count in (table.shape[1], rows))
    weights = resize_weights(old, new)
    grid = np.asarray(table[0, leading:], np.float64).reshape(old, old, -1)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(new * new, -1)
    return np.concatenate([table[0, :leading], grid.astype(table.dtype)])[None]


def resizer(leading: int) -> Callable[[np.ndarray, tuple[int, ...]], np.ndarray]:
    """A function of a table and the shape that it must have, for `common_jax.weights.take`."""
    return functools.partial(_resize_to, leading)


def _resize_to(leading: int, table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return resize_positions(table, shape[1], leading)


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


def _side(patches: int, leading: int) -> int:
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side:
        raise ValueError(
            f"a position table of {patches} patches after {leading} leading rows is no square grid "
            "and cannot be resized"
        )
    return side
