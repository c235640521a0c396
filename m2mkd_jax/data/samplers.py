"""Repeated augmentation by process, as the original defines it, for comparison.

Training does not use it: `common_jax.inputs.train_batches` distributes the same list over the rows
of the global batch, independently of the number of hosts. Batch s has places s B to (s + 1) B - 1
of the repeated permutation. The original's processes, whatever their number, together see the same
places in step s; the example at place p is row p here and belongs to process p mod `world` there.
Either way, copies of an image are neighbours. There are two differences: the original's permutation
depends only on the epoch, ours also on the seed; and the original first cuts an epoch to a multiple
of `rounding` examples, while we cut it to whole batches, which gives the same number of steps if
`rounding` divides the batch.
"""

import math

import numpy as np


def repeated_indices(
    permutation: np.ndarray, *, rank: int, world: int, repeats: int = 3, rounding: int = 256
) -> np.ndarray:
    """Returns the examples that process `rank` of `world` visits in an epoch, in order.

    Each index of the permutation is repeated `repeats` times in a row; the list is padded with its
    own beginning to a multiple of `world`; a process takes every world-th element from its rank on,
    and of these the first floor(floor(n / rounding) * rounding / world). So an epoch has about n
    samples of about n / repeats distinct images, and none for a set of fewer than `rounding`
    examples: use a plain permutation for small sets. (Deep Incubation, samplers.py RASampler.)

    Args:
      permutation: [n], the order of the epoch.
      rank, world: index of the process, and number of processes.
      repeats: copies of each example.
      rounding: the number of visited examples is a multiple of this.

    Raises:
      ValueError: no such process.
    """
    count = len(permutation)
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} must be from 0 to world - 1 = {world - 1}")
    repeated = np.repeat(permutation, repeats)
    padded = np.resize(repeated, math.ceil(len(repeated) / world) * world)
    return padded[rank::world][: count // rounding * rounding // world]
