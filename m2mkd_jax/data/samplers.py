"""Repeated augmentation as the original defines it, by process.

Training does without: `common_jax.inputs.train_batches` lays the same list out over the rows of the
global batch, so that it does not depend on how many hosts there are. Batch s holds places s B to
(s + 1) B - 1 of the repeated permutation, which is what the original's processes together see in
step s, however many they are; place p is row p of it here and belongs to process p mod `world`
there. Either way copies of an image are neighbours. Two things differ: there the permutation hangs
on the epoch alone, here on the seed as well; and there an epoch is first cut to a multiple of
`rounding` examples, here to whole batches, which is as many steps if `rounding` divides the batch.
"""

import math

import numpy as np


def repeated_indices(
    permutation: np.ndarray, *, rank: int, world: int, repeats: int = 3, rounding: int = 256
) -> np.ndarray:
    """The examples that process `rank` of `world` visits in an epoch, in order.

    Each index of the permutation stands `repeats` times in a row; the list is padded by its own
    head to a multiple of `world`; a process takes every world-th from its rank on, and keeps
    floor(floor(n / rounding) * rounding / world) of them. So an epoch has about n samples of about
    n / repeats distinct images, and a set of fewer than `rounding` examples has none: take a plain
    permutation for small sets. (Deep Incubation, samplers.py RASampler.)

    Args:
      permutation: [n], the order of the epoch.

    Raises:
      ValueError: no such process.
    """
    count = len(permutation)
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} must be from 0 to world - 1 = {world - 1}")
    repeated = np.repeat(permutation, repeats)
    padded = np.resize(repeated, math.ceil(len(repeated) / world) * world)
    return padded[rank::world][: count // rounding * rounding // world]
