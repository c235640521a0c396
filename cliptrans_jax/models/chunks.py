"""Sums over a batch's labels in chunks, since the logits of all labels do not fit in memory."""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common_jax.mesh import batch_shards

# Labels per device and chunk: enough rows for matrix products to run at full speed.
CHUNK = 1024


def counts(labels: Int[Array, "*B"], *, pad: int) -> Bool[Array, "*B"]:
    """True for labels that a loss counts: neither negative nor pads."""
    return (labels >= 0) & (labels != pad)


def sum_chunks(
    sums: Callable[[jax.Array, jax.Array], Any],
    states: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    pad: int,
    chunk: int = CHUNK,
) -> Any:
    """Adds up sums(states, labels) over chunks along T, with `chunk` labels per device.

    Args:
      sums: returns a tree of totals, to which pads must not contribute.
    """
    # Along T, so that every device computes its own examples in each chunk. At least one slot per
    # chunk; the last chunk is filled up with pads.
    rows = min(max(1, chunk * batch_shards() // len(labels)), states.shape[1])
    more = -states.shape[1] % rows
    states = jnp.pad(states, ((0, 0), (0, more), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, more)), constant_values=pad)
    parts = (  # [chunks, B, rows, ...]
        jnp.moveaxis(x.reshape(len(x), -1, rows, *x.shape[2:]), 1, 0) for x in (states, labels)
    )
    # One after the other: `vmap` would hold the logits of all chunks at once.
    parts = jax.lax.map(lambda part: sums(*part), tuple(parts))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
