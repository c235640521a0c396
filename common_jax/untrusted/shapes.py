"""Shapes of arrays that files declare."""

import math
from collections.abc import Sequence
from typing import Any

MOST_AXES = 64  # of an array, numpy's own limit
MOST_BYTES = 1 << 62  # numpy counts bytes in 64 bits


def are_counts(*values: Any) -> bool:
    """Returns True where all are integers that can be sizes or places."""
    return all(type(value) is int and 0 <= value < MOST_BYTES for value in values)


def full_size(shape: Sequence[int], itemsize: int) -> int:
    """Returns the bytes of an array with axes of length 0 counted as 1.

    An axis of length 0 would otherwise allow any length of the others.
    """
    return math.prod(max(axis, 1) for axis in shape) * itemsize
