"""Sums over a batch's labels in chunks, since the logits of all labels do not fit in memory."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from common_jax.mesh import AXES, BATCH, batch_shards

# Labels per device and chunk: enough rows for a matrix product at full speed.
CHUNK = 1024

Readout = Mapping[str, jax.Array]
# scores(readout, states) -> logits (B, T, V) of states (B, T, D)
Scores = Callable[[Readout, jax.Array], jax.Array]
# loss(readout, states, labels) -> a sum over the labels, without the pads
Loss = Callable[[Readout, jax.Array, jax.Array], jax.Array]


def total_of_chunks(
    loss: Loss,
    readout: Readout,
    states: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    pad: int,
    dtype: DTypeLike,
    chunk: int = CHUNK,
) -> Float[Array, ""]:
    """loss(readout, states, labels), with gradients, in chunks of `chunk` labels per device.

    The forward pass also computes the gradients of each chunk, so that its logits are computed only
    once. The readout's gradient is summed over the devices after the last chunk. Chunks of nothing
    but pads are skipped.

    Args:
      dtype: in which matrices of the readout are sent to the devices. Their gradients are summed in
        float32 at least.
    """
    return _total(_Task(loss, pad, jnp.dtype(dtype), chunk), readout, states, labels)


def sum_chunks(
    sums: Callable[[jax.Array, jax.Array], Any],
    states: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    pad: int,
    chunk: int = CHUNK,
) -> Any:
    """sums(states, labels) added up over chunks along T of `chunk` labels per device.

    Args:
      sums: returns a tree of totals, which must not count pads.
    """
    parts = _cut(states, labels, pad=pad, rows=chunk * batch_shards() // len(labels))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(lambda part: sums(*part), parts))


@dataclasses.dataclass(frozen=True)
class _Task:
    """The arguments of `total_of_chunks` that are not arrays."""

    loss: Loss
    pad: int
    dtype: jnp.dtype
    chunk: int

    def gradients(
        self, readout: Readout, states: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Readout, jax.Array]:
        """The loss on one device, and its gradients by readout and states."""
        rows, flat = states.reshape(-1, states.shape[-1]), labels.reshape(-1)
        chunk = min(self.chunk, len(flat))
        # Pads come last, so that whole chunks of them can be skipped. The last chunk is filled with
        # places outside the rows, which are read as zeros and never written.
        order = jnp.argsort(flat == self.pad, stable=True)
        order = jnp.pad(order, (0, -len(flat) % chunk), constant_values=len(flat))

        def add(number, carry):
            total, sums, by_rows = carry
            places = jax.lax.dynamic_slice(order, (number * chunk,), (chunk,))
            part = rows.at[places].get(mode="fill", fill_value=0)
            part_labels = flat.at[places].get(mode="fill", fill_value=self.pad)
            value, (by_readout, by_part) = jax.value_and_grad(self.loss, (0, 1))(
                readout, part[None], part_labels[None]
            )
            sums = {name: x + by_readout[name].astype(x.dtype) for name, x in sums.items()}
            return total + value, sums, by_rows.at[places].set(by_part[0], mode="drop")

        sums = {name: jnp.zeros(x.shape, _wide(x.dtype)) for name, x in readout.items()}
        start = jnp.zeros((), _wide(states.dtype)), sums, jnp.zeros_like(rows)
        # Reverse mode cannot differentiate a loop with a traced bound; `add` takes the gradients.
        chunks = (jnp.sum(flat != self.pad) + chunk - 1) // chunk
        total, sums, by_rows = jax.lax.fori_loop(0, chunks, add, start)
        return total, sums, by_rows.reshape(states.shape)


# A custom VJP, since the usual one would compute all logits again in the backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(task: _Task, readout: Readout, states: jax.Array, labels: jax.Array) -> jax.Array:
    loss = functools.partial(task.loss, readout)
    return sum_chunks(loss, states, labels, pad=task.pad, chunk=task.chunk)


def _forward(task: _Task, readout: Readout, states: jax.Array, labels: jax.Array):
    low = {name: x.astype(task.dtype) if x.ndim > 1 else x for name, x in readout.items()}
    if jax.sharding.get_abstract_mesh().empty:
        total, sums, by_states = task.gradients(low, states, labels)
    else:
        total, sums, by_states = _over_mesh(task, low, states, labels)
    by_readout = {name: x.astype(readout[name].dtype) for name, x in sums.items()}
    return total, (by_readout, by_states)


def _backward(task: _Task, gradients: tuple[Readout, jax.Array], slope: jax.Array):
    return *jax.tree.map(lambda x: (slope * x).astype(x.dtype), gradients), None


_total.defvjp(_forward, _backward)


def _over_mesh(task: _Task, readout: Readout, states: jax.Array, labels: jax.Array):
    """`_Task.gradients` of each device's share, summed over all devices. Gradients of matrices are
    split along their last axis, as the embedding is."""
    whole, split = PartitionSpec(), PartitionSpec(None, "fsdp")

    def local(readout, states, labels):
        total, sums, by_states = task.gradients(readout, states, labels)
        sums = {
            name: scatter(x) if x.ndim > 1 else jax.lax.psum(x, AXES) for name, x in sums.items()
        }
        return jax.lax.psum(total, AXES), sums, by_states

    def scatter(x: jax.Array) -> jax.Array:
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=x.ndim - 1, tiled=True)
        return jax.lax.psum(x, tuple(axis for axis in AXES if axis != "fsdp"))

    specs = {name: split if x.ndim > 1 else whole for name, x in readout.items()}
    # check_vma would require the constants that sums start from to be cast to varying ones. Tests
    # compare the result with that of no mesh instead.
    return jax.shard_map(
        local, in_specs=(whole, BATCH, BATCH), out_specs=(whole, specs, BATCH), check_vma=False
    )(readout, states, labels)


def _cut(
    states: Float[Array, "B T D"], labels: Int[Array, "B T"], *, pad: int, rows: int
) -> tuple[Float[Array, "_ B R D"], Int[Array, "_ B R"]]:
    """Chunks of `rows` slots along T, at least one, the last one filled with pads."""
    rows = min(max(1, rows), states.shape[1])
    more = -states.shape[1] % rows
    states = jnp.pad(states, ((0, 0), (0, more), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, more)), constant_values=pad)
    return tuple(
        jnp.moveaxis(x.reshape(len(x), -1, rows, *x.shape[2:]), 1, 0) for x in (states, labels)
    )


def _wide(dtype: DTypeLike) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
