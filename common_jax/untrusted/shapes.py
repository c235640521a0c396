"""Shapes of arrays, as files declare them."""

import math
from collections.abc import Sequence
from typing import Any

MOST_AXES = 64  # of an array, as numpy has them
MOST_BYTES = 1 << 62  # numpy counts them in 64 bits


def are_counts(*values: Any) -> bool:
    """Whether all values are whole numbers in the range of sizes and offsets."""
    return all(type(value) is int and 0 <= value < MOST_BYTES for value in values)


def full_size(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of an array if no axis had length 0, which lets the others be of any length."""
    return math.prod(max(axis, 1) for axis in shape) * itemsize
