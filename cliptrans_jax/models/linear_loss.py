"""The label loss of a linear readout and its gradients, without materialising all logits.

The logits of 8,192 labels over 250,054 tokens take 8 GB. But, as in attention over 250,054 keys,
they only enter sums, which can be accumulated over blocks of the vocabulary: with p_v = exp(logit_v
- log_z),

  log_z = log sum_v exp(logit_v),  states' gradient: sum_v p_v e_v,  embeddings' gradient: p_v x.

The numerators of p, relative to the largest logit of their block, are kept in memory, so that a
chunk's logits are computed only once.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from cliptrans_jax.models.chunks import counts
from common_jax.mesh import AXES, BATCH

# Tokens of the vocabulary per block. The loop over blocks is unrolled in Python: in a compiled
# loop, XLA for GPUs would copy every block that it slices.
BLOCK = 32768
# Precisions at which matrix products on TPUs round float32 to bfloat16; None is JAX's default.
ROUNDING = (None, "default", "fastest", "bfloat16")


def linear_loss(
    matrix: Float[Array, "V D"],
    bias: Float[Array, " V"],
    states: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    pad: int,
    smoothing: float,
    chunk: int,
) -> Float[Array, ""]:
    """The sum of `label_loss` of logits = states matrix^T + bias.

    The forward pass also computes the gradients, chunk by chunk. The matrix's gradient accumulates
    in float32 at least, and is reduced over devices after the last chunk. Gradients of a matrix or
    bias that is not trained are not computed. Chunks with only pads are skipped.

    Args:
      matrix: gathered in the dtype of `states`, in which products are computed; on TPUs, float32 is
        gathered as bfloat16 unless a higher matmul precision is set.
      chunk: labels per device and chunk, whose numerators of p are all in memory at once.
    """
    return _total(_Task(pad, smoothing, chunk), matrix, bias, states, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(task: "_Task", matrix: Any, bias: Any, states: Any, labels: Any) -> jax.Array:
    return _compute(task, matrix, bias, states, labels)[0]


def _forward(task: "_Task", matrix: Any, bias: Any, states: Any, labels: Any):
    """The total, and its gradients by matrix, bias and states; None for those not trained."""
    # With symbolic zeros, `perturbed` says whether the gradient by an argument is needed.
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
    mesh = jax.sharding.get_abstract_mesh()
    # On a single device, XLA for CPUs would copy the matrix and its gradient in every collective.
    over = task.run if mesh.empty or mesh.size == 1 else _over_mesh(task)
    total, by_matrix, by_bias, by_states = over(low, bias, states, labels)
    by_matrix = None if by_matrix is None else by_matrix.astype(matrix.dtype)
    return total, by_matrix, None if by_bias is None else by_bias.astype(bias.dtype), by_states


def _over_mesh(task: "_Task"):
    """`task.run` on each device's share, summed over all devices. Matrix and gradient are sharded
    along their last axis, like embeddings."""
    whole, split = PartitionSpec(), PartitionSpec(None, "fsdp")

    def local(sent, matrix, bias, states, labels):
        # Done here, since XLA would gather before rounding.
        matrix = jax.lax.all_gather(matrix.astype(sent), "fsdp", axis=1, tiled=True)
        total, by_matrix, by_bias, by_states = task.run(matrix, bias, states, labels)
        total, by_bias = jax.lax.psum((total, by_bias), AXES)
        if by_matrix is not None:
            by_matrix = _scatter(by_matrix)
        return total, by_matrix, by_bias, by_states

    def by_platform(matrix, *others):
        own = functools.partial(local, matrix.dtype)
        if matrix.dtype != jnp.float32 or jax.config.jax_default_matmul_precision not in ROUNDING:
            return own(matrix, *others)
        # Products on TPUs round it to bfloat16 anyway.
        rounded = functools.partial(local, jnp.bfloat16)
        return jax.lax.platform_dependent(matrix, *others, tpu=rounded, default=own)

    # check_vma would require casting the initial constants of sums to varying. Instead, tests
    # compare the result with and without a mesh.
    return jax.shard_map(
        by_platform,
        in_specs=(split, whole, BATCH, BATCH),
        out_specs=(whole, split, whole, BATCH),
        check_vma=False,
    )


def _scatter(x: Float[Array, "V D"]) -> Float[Array, "V d"]:
    """Sums `x` over all devices; each keeps its share of the last axis.

    It reduce-scatters along the first axis, then exchanges shares (all-to-all): if a share of the
    last axis has fewer than 128 numbers, XLA for TPUs would all-reduce the whole, which sends twice
    as much.
    """
    rows = jnp.pad(x, ((0, -len(x) % jax.lax.axis_size("fsdp")), (0, 0)))
    rows = jax.lax.psum_scatter(rows, "fsdp", scatter_dimension=0, tiled=True)
    rows = jax.lax.psum(rows, tuple(axis for axis in AXES if axis != "fsdp"))
    return jax.lax.all_to_all(rows, "fsdp", split_axis=1, concat_axis=0, tiled=True)[: len(x)]


class _Sums(NamedTuple):
    """What chunks accumulate and fill in.

    Attributes:
      total: the loss.
      by_matrix, by_bias: gradients by each block, without the terms of labels and smoothing; empty
        if not trained.
      by_rows: complete gradients by the states.
      by_labels: gradient by the logit of each row's label, without the smoothing term.
    """

    total: Float[Array, ""]
    by_matrix: tuple[Float[Array, "V D"], ...]
    by_bias: tuple[Float[Array, " V"], ...]
    by_rows: Float[Array, "T D"]
    by_labels: Float[Array, " T"]


class _Block(NamedTuple):
    """A part of the vocabulary: its first token, its rows of the matrix, and its bias."""

    first: int
    vectors: Float[Array, "V D"]
    bias: Float[Array, " V"]


class _Readout(NamedTuple):
    """Matrix and bias, both whole and in blocks, and the mean of the matrix's rows."""

    matrix: Float[Array, "V D"]
    bias: Float[Array, " V"]
    mean: Float[Array, " D"]
    blocks: list[_Block]


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
        kind = jnp.promote_types(rows.dtype, jnp.float32)
        bias = bias.astype(kind)
        mean = jnp.mean(matrix, axis=0, dtype=kind)  # once, not in every chunk
        readout = _Readout(matrix, bias, mean, _cut(matrix, bias))
        zeros = functools.partial(jnp.zeros_like, dtype=kind)
        sums = _Sums(
            jnp.zeros((), kind),
            tuple(zeros(block.vectors) for block in readout.blocks if self.by_matrix),
            tuple(zeros(block.bias) for block in readout.blocks if self.by_bias),
            jnp.zeros_like(rows),
            zeros(flat),
        )
        sums = self._chunks(readout, rows, flat, sums)

        real, labels = counts(flat, pad=self.pad), jnp.maximum(flat, 0)
        by_matrix = by_bias = None
        share = self.smoothing / len(matrix)
        if self.by_matrix:
            by_matrix = jnp.concatenate(sums.by_matrix)
            if share:  # smoothing subtracts the same from the gradient of every token's row
                by_matrix = by_matrix - share * (real.astype(kind) @ rows.astype(kind))
            by_matrix = by_matrix.at[labels].add(sums.by_labels[:, None] * rows)
        if self.by_bias:
            by_bias = jnp.concatenate(sums.by_bias) - share * jnp.sum(real)
            by_bias = by_bias.at[labels].add(sums.by_labels)
        return sums.total, by_matrix, by_bias, sums.by_rows.reshape(states.shape)

    def _chunks(self, readout: _Readout, rows, labels, sums: _Sums) -> _Sums:
        """Adds all chunks of rows to `sums`."""
        count, chunk = len(labels), min(self.chunk, len(labels))
        # Pads are sorted to the end, so that whole chunks of them can be skipped. The last chunk is
        # filled up with out-of-range indices, which read zeros and are never written.
        order = jnp.argsort(labels == self.pad, stable=True)
        order = jnp.pad(order, (0, -count % chunk), constant_values=count)

        def add(number: Any, sums: _Sums) -> _Sums:
            places = jax.lax.dynamic_slice(order, (number * chunk,), (chunk,))
            part = rows.at[places].get(mode="fill", fill_value=0)
            part_labels = labels.at[places].get(mode="fill", fill_value=self.pad)
            return self._add(readout, part, part_labels, places, sums)

        if chunk == count:  # a single chunk needs no loop with a data-dependent length
            return add(0, sums)
        chunks = (jnp.sum(labels != self.pad) + chunk - 1) // chunk
        # Reverse mode cannot differentiate a loop with a traced bound; `add` computes the
        # gradients.
        return jax.lax.fori_loop(0, chunks, add, sums)

    def _add(self, readout: _Readout, rows, labels, places, sums: _Sums) -> _Sums:
        """Adds a chunk of rows, whose indices are `places`."""
        kind, smoothing = sums.total.dtype, self.smoothing
        real = counts(labels, pad=self.pad).astype(kind)
        labels = jnp.maximum(labels, 0)
        # The label is treated separately, without rounding p: its gradient is p - 1.
        own, wide = readout.matrix[labels].astype(kind), rows.astype(kind)
        label_logits = jnp.sum(wide * own, axis=1) + readout.bias[labels]
        parts = []
        for block in readout.blocks:
            parts.append(_weigh(block, rows, labels))
            # Forces one block after the other: XLA for GPUs would merge the sums of all blocks, and
            # keep all logits until then.
            rows, _ = jax.lax.optimization_barrier((rows, parts[-1].total))

        top = functools.reduce(jnp.maximum, (part.top for part in parts), label_logits)
        scales = [jnp.exp(part.top - top) for part in parts]
        scaled_parts = list(zip(scales, parts, strict=True))
        total = sum((x * part.total for x, part in scaled_parts), jnp.exp(label_logits - top))
        vectors = sum(x[:, None] * part.vectors for x, part in scaled_parts)
        log_z = top + jnp.log(total)
        losses = log_z - (1 - smoothing) * label_logits
        # p - (1 - smoothing) of the label; expm1(log p) = p - 1 stays exact where p is close to 1.
        by_labels = real * (jnp.expm1(label_logits - log_z) + smoothing)
        by_rows = by_labels[:, None] * own + (real / total)[:, None] * vectors
        if smoothing:
            losses = losses - smoothing * (wide @ readout.mean + jnp.mean(readout.bias))
            by_rows = by_rows - smoothing * real[:, None] * readout.mean

        # p = weights * share. The rows [T, D] are scaled by it, not the far larger weights [T, V].
        shares = [real * x / total for x in scales]
        product = functools.partial(jnp.einsum, preferred_element_type=kind)
        by_matrix = tuple(
            old + product("TV,TD->VD", part.weights, (share[:, None] * rows).astype(rows.dtype))
            for old, part, share in zip(sums.by_matrix, parts, shares, strict=False)
        )
        by_bias = tuple(
            old + product("TV,T->V", part.weights, share)
            for old, part, share in zip(sums.by_bias, parts, shares, strict=False)
        )
        return _Sums(
            sums.total + jnp.sum(real * losses),
            by_matrix,
            by_bias,
            sums.by_rows.at[places].set(by_rows.astype(rows.dtype), mode="drop"),
            sums.by_labels.at[places].set(by_labels, mode="drop"),
        )


class _Part(NamedTuple):
    """The sums of a chunk over a block.

    Attributes:
      top: largest logit of each row, except its label's.
      weights: exp(logit - top) in the dtype of the states; 0 for the label.
      total: sum of the weights.
      vectors: sum of the block's vectors times these weights.
    """

    top: Float[Array, " T"]
    weights: Float[Array, "T V"]
    total: Float[Array, " T"]
    vectors: Float[Array, "T D"]


def _weigh(block: _Block, rows: Float[Array, "T D"], labels: Int[Array, " T"]) -> _Part:
    kind = block.bias.dtype
    logits = jnp.einsum("TD,VD->TV", rows, block.vectors, preferred_element_type=kind) + block.bias
    tokens = block.first + jnp.arange(len(block.bias), dtype=labels.dtype)
    logits = jnp.where(tokens == labels[:, None], -jnp.inf, logits)
    top = jnp.max(logits, axis=1)
    weights = jnp.exp(logits - top[:, None])
    low = weights.astype(rows.dtype)
    vectors = jnp.einsum("TV,VD->TD", low, block.vectors, preferred_element_type=kind)
    return _Part(top, low, jnp.sum(weights, axis=1), vectors)


def _cut(matrix: Float[Array, "V D"], bias: Float[Array, " V"]) -> list[_Block]:
    """Blocks of equal size, a multiple of 128, except for a smaller last one."""
    count = -(-len(matrix) // BLOCK)
    size = min(-(-len(matrix) // (128 * count)) * 128, len(matrix))
    firsts = range(0, len(matrix), size)
    return [_Block(i, matrix[i : i + size], bias[i : i + size]) for i in firsts]
