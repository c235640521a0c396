"""The label loss of a linear readout, with its gradients, without all logits in memory.

The logits of 8,192 labels over 250,054 tokens take 8 GB. As in attention over 250,054 keys, a row
of logits is only needed in sums, which are added up over blocks of the vocabulary: with
p_v = exp(logit_v - log_z),

  log_z = log sum_v exp(logit_v),  states' gradient: sum_v p_v e_v,  embeddings' gradient: p_v x.

The first two take one pass over the vocabulary, with a running maximum. It keeps the numerators of
p, so that the logits are computed only once, and a second pass multiplies these with the states.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from common_jax.mesh import AXES, BATCH

# Tokens of the vocabulary per block. The logits of a block fit into a TPU's on-chip memory; with
# fewer tokens the sums over blocks would be read and written more often.
BLOCK = 4096


def linear_loss(
    matrix: Float[Array, "V D"],
    bias: Float[Array, "V"],
    states: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    pad: int,
    smoothing: float,
    chunk: int,
) -> Float[Array, ""]:
    """The sum of `label_loss` of logits = states matrix^T + bias.

    The forward pass also computes the gradients, chunk by chunk: that of the matrix is summed in
    float32 at least, and over the devices after the last chunk. If matrix or bias are not trained,
    their gradients are not computed. Chunks of nothing but pads are skipped.

    Args:
      matrix: sent to the devices in the dtype of `states`, in which products are computed.
      chunk: labels per device and chunk, whose numerators of p are in memory at once.
    """
    return _total(_Task(pad, smoothing, chunk), matrix, bias, states, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(task: "_Task", matrix: Any, bias: Any, states: Any, labels: Any) -> jax.Array:
    return _compute(task, matrix, bias, states, labels)[0]


def _forward(task: "_Task", matrix: Any, bias: Any, states: Any, labels: Any):
    """The total, and its gradients by matrix, bias and states; None for what is not trained."""
    task = dataclasses.replace(task, by_matrix=matrix.perturbed, by_bias=bias.perturbed)
    values = (x.value for x in (matrix, bias, states, labels))
    total, by_matrix, by_bias, by_states = _compute(task, *values)
    return total, (by_matrix, by_bias, by_states)


def _backward(task: "_Task", gradients: tuple[Any, ...], slope: Any):
    if isinstance(slope, SymbolicZero):
        return None, None, None, None
    return *jax.tree.map(lambda x: (slope * x).astype(x.dtype), gradients), None


_total.defvjp(_forward, _backward, symbolic_zeros=True)


def _compute(task: "_Task", matrix: Any, bias: Any, states: Any, labels: Any):
    low = matrix.astype(states.dtype)
    over = task.run if jax.sharding.get_abstract_mesh().empty else _over_mesh(task)
    total, by_matrix, by_bias, by_states = over(low, bias, states, labels)
    by_matrix = None if by_matrix is None else by_matrix.astype(matrix.dtype)
    return total, by_matrix, None if by_bias is None else by_bias.astype(bias.dtype), by_states


def _over_mesh(task: "_Task"):
    """`task.run` of each device's share, summed over all devices. The matrix's gradient is split
    along its last axis, as embeddings are."""
    whole, split = PartitionSpec(), PartitionSpec(None, "fsdp")

    def local(matrix, bias, states, labels):
        total, by_matrix, by_bias, by_states = task.run(matrix, bias, states, labels)
        total, by_bias = jax.lax.psum((total, by_bias), AXES)
        if by_matrix is not None:
            by_matrix = jax.lax.psum_scatter(by_matrix, "fsdp", scatter_dimension=1, tiled=True)
            by_matrix = jax.lax.psum(by_matrix, tuple(axis for axis in AXES if axis != "fsdp"))
        return total, by_matrix, by_bias, by_states

    # check_vma would require the constants that sums start from to be cast to varying ones. Tests
    # compare the result with that of no mesh instead.
    return jax.shard_map(
        local,
        in_specs=(whole, whole, BATCH, BATCH),
        out_specs=(whole, split, whole, BATCH),
        check_vma=False,
    )


class _Sums(NamedTuple):
    """What chunks add up and fill in.

    Attributes:
      total: of the loss.
      by_matrix, by_bias: gradients without the parts of labels and smoothing; None if not trained.
      by_rows: gradients by the states, complete.
      by_labels: gradient by the logit of each row's label, without the part of smoothing.
    """

    total: Float[Array, ""]
    by_matrix: Float[Array, "V D"] | None
    by_bias: Float[Array, "V"] | None
    by_rows: Float[Array, "T D"]
    by_labels: Float[Array, "T"]


@dataclasses.dataclass(frozen=True)
class _Task:
    """The loss on one device.

    Attributes:
      pad, smoothing, chunk: see `linear_loss`.
      by_matrix, by_bias: whether their gradients are computed.
    """

    pad: int
    smoothing: float
    chunk: int
    by_matrix: bool = False
    by_bias: bool = False

    def run(self, matrix: jax.Array, bias: jax.Array, states: jax.Array, labels: jax.Array):
        """The total, and its gradients by matrix, bias and states."""
        rows, flat = states.reshape(-1, states.shape[-1]), labels.reshape(-1)
        kind = _wide(rows.dtype)
        mean = jnp.mean(matrix, axis=0, dtype=kind), jnp.mean(bias, dtype=kind)
        sums = _Sums(
            jnp.zeros((), kind),
            jnp.zeros(matrix.shape, kind) if self.by_matrix else None,
            jnp.zeros(bias.shape, kind) if self.by_bias else None,
            jnp.zeros_like(rows),
            jnp.zeros(flat.shape, kind),
        )
        sums = self._chunks(matrix, bias.astype(kind), mean, rows, flat, sums)

        real, labels = self._real(flat), jnp.maximum(flat, 0)
        by_matrix, by_bias = sums.by_matrix, sums.by_bias
        share = self.smoothing / len(matrix)
        if by_matrix is not None:
            # Of all labels at once, since XLA for TPUs copies what a scatter in a loop adds to.
            by_matrix = by_matrix.at[labels].add(sums.by_labels[:, None] * rows)
            if share:
                by_matrix = by_matrix - share * (real.astype(kind) @ rows.astype(kind))
        if by_bias is not None:
            by_bias = by_bias.at[labels].add(sums.by_labels) - share * jnp.sum(real)
        return sums.total, by_matrix, by_bias, sums.by_rows.reshape(states.shape)

    def _real(self, labels: Int[Array, "T"]) -> jax.Array:
        return (labels >= 0) & (labels != self.pad)

    def _chunks(self, matrix, bias, mean, rows, labels, sums: _Sums) -> _Sums:
        """Adds all chunks of rows to `sums`."""
        count, chunk = len(labels), min(self.chunk, len(labels))
        # Pads come last, so that whole chunks of them can be skipped. The last chunk is filled with
        # places outside the rows, which are read as zeros and never written.
        order = jnp.argsort(labels == self.pad, stable=True)
        order = jnp.pad(order, (0, -count % chunk), constant_values=count)

        def add(number: Any, sums: _Sums) -> _Sums:
            places = jax.lax.dynamic_slice(order, (number * chunk,), (chunk,))
            part = rows.at[places].get(mode="fill", fill_value=0)
            part_labels = labels.at[places].get(mode="fill", fill_value=self.pad)
            return self._add(matrix, bias, mean, part, part_labels, places, sums)

        if chunk == count:  # one chunk, and no loop whose length is data
            return add(0, sums)
        chunks = (jnp.sum(labels != self.pad) + chunk - 1) // chunk
        # Reverse mode cannot differentiate a loop with a traced bound; `add` takes the gradients.
        return jax.lax.fori_loop(0, chunks, add, sums)

    def _add(self, matrix, bias, mean, rows, labels, places, sums: _Sums) -> _Sums:
        """Adds a chunk of rows, which stand at `places`."""
        kind, smoothing = sums.total.dtype, self.smoothing
        real, labels = self._real(labels).astype(kind), jnp.maximum(labels, 0)
        own = matrix[labels].astype(kind)
        wide = rows.astype(kind)
        label_logits = jnp.sum(wide * own, axis=1) + bias[labels]
        top, total, mixed, parts = _first_pass(matrix, bias, rows, labels, label_logits)

        log_z = top + jnp.log(total)
        losses = log_z - (1 - smoothing) * label_logits
        # p - (1 - e) without the cancellation of p near 1, and 0 for pads.
        by_labels = real * (jnp.expm1(label_logits - log_z) + smoothing)
        by_rows = (real / total)[:, None] * mixed + by_labels[:, None] * own
        if smoothing:
            mean_vector, mean_bias = mean
            losses = losses - smoothing * (wide @ mean_vector + mean_bias)
            by_rows = by_rows - smoothing * real[:, None] * mean_vector
        by_matrix, by_bias = _second_pass(parts, rows, real, log_z, sums.by_matrix, sums.by_bias)
        return _Sums(
            sums.total + jnp.sum(real * losses),
            by_matrix,
            by_bias,
            sums.by_rows.at[places].set(by_rows.astype(rows.dtype), mode="drop"),
            sums.by_labels.at[places].set(by_labels, mode="drop"),
        )


class _Part(NamedTuple):
    """A block of the first pass.

    Attributes:
      start: its first token.
      weights: exp(logit - top), in the dtype of the states; 0 for the label, and for tokens of the
        block before it.
      top: of each row, its largest logit in this block and those before it.
    """

    start: Int[Array, "..."]
    weights: Float[Array, "... T V"]
    top: Float[Array, "... T"]


def _first_pass(matrix, bias, rows, labels, label_logits):
    """Sums over the vocabulary: `top`, the largest logit; sum_v exp(logit_v - top); the sum of
    exp(logit_v - top) e_v over all tokens but the label; and the blocks, stacked."""
    size = _block_size(len(matrix))
    # The last block begins earlier, so that all have one size.
    first = np.arange(0, len(matrix), size, dtype=np.int32)
    starts = np.minimum(first, len(matrix) - size)

    def weigh(carry: Any, block: Any):
        top, total, mixed = carry
        start, first = block
        vectors = jax.lax.dynamic_slice_in_dim(matrix, start, size)
        logits = jnp.einsum("TD,VD->TV", rows, vectors, preferred_element_type=top.dtype)
        logits = logits + jax.lax.dynamic_slice_in_dim(bias, start, size)
        tokens = start + jnp.arange(size, dtype=jnp.int32)
        # The label has its own sums, in which it is not rounded to the dtype of the states.
        left_out = (tokens == labels[:, None]) | (tokens < first)
        logits = jnp.where(left_out, -jnp.inf, logits)
        new = jnp.maximum(top, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp(logits - new[:, None]), jnp.exp(top - new)
        total = shrink * total + jnp.sum(weights, axis=1)
        weights = weights.astype(rows.dtype)
        vectors = jnp.einsum("TV,VD->TD", weights, vectors, preferred_element_type=top.dtype)
        return (new, total, shrink[:, None] * mixed + vectors), _Part(start, weights, new)

    start = label_logits, jnp.ones_like(label_logits), jnp.zeros(rows.shape, label_logits.dtype)
    (top, total, mixed), parts = jax.lax.scan(weigh, start, (starts, first))
    return top, total, mixed, parts


def _second_pass(parts: _Part, rows, real, log_z, by_matrix, by_bias):
    """Adds sum_t p_tv x_t to `by_matrix` and sum_t p_tv to `by_bias`, for all tokens v but the
    labels."""
    if by_matrix is None and by_bias is None:
        return None, None

    def add(sums: Any, part: _Part):
        scales = real * jnp.exp(part.top - log_z)
        wide = {"preferred_element_type": scales.dtype}
        new = (
            jnp.einsum(
                "TV,TD->VD", part.weights, (scales[:, None] * rows).astype(rows.dtype), **wide
            ),
            jnp.einsum("TV,T->V", part.weights, scales, **wide),
        )
        return jax.tree.map(functools.partial(_add_block, part.start), sums, new), None

    return jax.lax.scan(add, (by_matrix, by_bias), parts)[0]


def _add_block(start: jax.Array, total: jax.Array, block: jax.Array) -> jax.Array:
    old = jax.lax.dynamic_slice_in_dim(total, start, len(block))
    return jax.lax.dynamic_update_slice_in_dim(total, old + block, start, axis=0)


def _block_size(vocab: int) -> int:
    """Tokens per block: the vocabulary in as many blocks as it has BLOCKs, rounded up to 16."""
    blocks = -(-vocab // BLOCK)
    return min(vocab, -(-vocab // (16 * blocks)) * 16)


def _wide(dtype: DTypeLike) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
