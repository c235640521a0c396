"""Sums over the labels of a batch in chunks, for what is too large to be there for all of them at
once: the logits of a vocabulary."""

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

# Labels that a device works on at a time: as many rows as keep a matrix product busy.
CHUNK = 1024

Readout = Mapping[str, jax.Array]
# scores(readout, states) -> logits (B, T, V) of states (B, T, D)
Scores = Callable[[Readout, jax.Array], jax.Array]
# loss(readout, states, labels) -> a sum over the labels, to which pads add nothing
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
    """loss(readout, states, labels), with gradients, in chunks of `chunk` labels a device.

    A chunk's gradients are taken while its logits are there, so that these are computed once, as
    without chunks. What the devices know of the readout's gradient is summed over them once, after
    the last chunk. Pads cost nothing: a device has as many chunks as its other labels fill.

    Args:
      dtype: what matrices of the readout are brought to the devices in. Their gradient is summed in
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
    """sums(states, labels) added up over chunks along T, each of `chunk` labels a device.

    Args:
      sums: gives a tree of totals, to which labels that are pads must not add.
    """
    parts = _cut(states, labels, pad=pad, rows=chunk * batch_shards() // len(labels))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(lambda part: sums(*part), parts))


@dataclasses.dataclass(frozen=True)
class _Task:
    """Arguments of `total_of_chunks` that are no arrays."""

    loss: Loss
    pad: int
    dtype: jnp.dtype
    chunk: int

    def gradients(
        self, readout: Readout, states: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Readout, jax.Array]:
        """The loss on one device, and its gradients by readout and states.

        Labels come in an order with the pads last, and chunks of nothing but pads are not
        computed.
        """
        rows, flat = states.reshape(-1, states.shape[-1]), labels.reshape(-1)
        chunk = min(self.chunk, len(flat))
        order = jnp.argsort(flat == self.pad, stable=True)
        # The last chunk is filled up with places after the rows: read as zeros, never written.
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
        chunks = (jnp.sum(flat != self.pad) + chunk - 1) // chunk
        total, sums, by_rows = jax.lax.fori_loop(0, chunks, add, start)
        return total, sums, by_rows.reshape(states.shape)


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
    """`_Task.gradients` of every device's share, with sums over all; those of matrices come out
    split along their last axis, as the embedding lies."""
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
    # check_vma off: sums start from constants, which it would have cast to every device's own. What
    # it guards is tested against no mesh.
    return jax.shard_map(
        local, in_specs=(whole, BATCH, BATCH), out_specs=(whole, specs, BATCH), check_vma=False
    )(readout, states, labels)


def _cut(
    states: Float[Array, "B T D"], labels: Int[Array, "B T"], *, pad: int, rows: int
) -> tuple[Float[Array, "_ B R D"], Int[Array, "_ B R"]]:
    """Chunks of so many slots along T, but of one at least, filled up with pads."""
    rows = min(max(1, rows), states.shape[1])
    more = -states.shape[1] % rows
    states = jnp.pad(states, ((0, 0), (0, more), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, more)), constant_values=pad)
    return tuple(
        jnp.moveaxis(x.reshape(len(x), -1, rows, *x.shape[2:]), 1, 0) for x in (states, labels)
    )


def _wide(dtype: DTypeLike) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
