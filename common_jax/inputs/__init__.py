"""Batches of a random-access source, whose order is computed and never stored.

The example at a place of an epoch is a function of (seed, epoch, place), so the position of a run
is its global step: there is nothing to save, and a run resumes exactly on another number of hosts.
Random transforms draw from a generator seeded by (seed, epoch, index), so a resumed run also sees
the same pixels.

A batch is a dict of numpy arrays with the examples along the first axis. `batch` is always the
global size; each host yields its own consecutive rows.
"""

from common_jax.inputs.batches import EvalTransform, TrainTransform, eval_batches, train_batches
from common_jax.inputs.examples import BadExample, Batch, Example, Source
from common_jax.inputs.order import (
    epoch_permutation,
    example_generator,
    example_index,
    host_rows,
    steps_per_epoch,
)
