"""Resizing position tables to a different grid of patches."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

CUBIC = -0.75  # coefficient of the cubic convolution; jax.image.resize has -0.5 and antialiases


def resize_positions(
    table: Float[np.ndarray, "1 T D"], rows: int, leading: int = 1
) -> Float[np.ndarray, "1 T2 D"]:
    """Resizes a table to `rows` rows: leading rows stay, the square grid P of patches becomes
    W P W^T.

    Cubic convolution with half-pixel centres, taps outside clamped to the border, without
    antialiasing or renormalisation, like the original's framework (m2mKD, loading of position
    tables). DINOv2 without registers and SigLIP do the same; timm, and DINOv2 with registers,
    antialias when downsizing.

    Args:
      table: position embeddings of the tokens.
      rows: number of rows of the result, including the leading rows.
      leading: rows before the patches, see `EncoderConfig.leading_positions`. They cannot be
        inferred from the number of rows: 201 is both 5 + 14^2 and 32 + 13^2.

    Raises:
      ValueError: if one of the two grids is not square.
    """
    old, new = (_side(count - leading, leading) for count in (table.shape[1], rows))
    weights = resize_weights(old, new)
    grid = np.asarray(table[0, leading:], np.float64).reshape(old, old, -1)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(new * new, -1)
    return np.concatenate([table[0, :leading], grid.astype(table.dtype)])[None]


def resizer(leading: int) -> Callable[[np.ndarray, tuple[int, ...]], np.ndarray]:
    """A function that resizes a table to a shape, for `common_jax.weights.take`."""
    return lambda table, shape: resize_positions(table, shape[1], leading)


def resize_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """W, whose row i has the weights of the `old` places in new place i; the identity if the sizes
    are equal."""
    weights = np.zeros((new, old))
    for i in range(new):
        # The centre of new place i, in units of old places.
        centre = (i + 0.5) * old / new - 0.5
        first = math.floor(centre)
        for tap in range(first - 1, first + 3):
            # Taps beyond the border count for the border itself, as in torch.
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
            f"a position table of {patches} patches after {leading} leading rows cannot be "
            "resized, since it is not a square grid"
        )
    return side
