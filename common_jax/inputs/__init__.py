"""Batches from a random-access source, in an order that is computed and never stored.

The example at each place of an epoch is a function of (seed, epoch, place), so the global step
alone gives a run's position: there is no iterator state to save, and a run resumes exactly, even on
a different number of hosts. Random transforms draw from a generator seeded by (seed, epoch, index),
so a resumed run also sees the same pixels.

A batch is a dict of numpy arrays with examples along the first axis. `batch` is always the global
batch size; each host yields its own consecutive rows.
"""

from common_jax.inputs.batches import EvalTransform, TrainTransform, eval_batches, train_batches
from common_jax.inputs.examples import BadExample, BadExamples, Batch, Example, Source, name_of
from common_jax.inputs.order import (
    epoch_permutation,
    example_generator,
    example_index,
    host_rows,
    steps_per_epoch,
)
