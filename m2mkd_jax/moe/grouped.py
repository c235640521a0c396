"""The expert MLPs on tokens sorted by expert, without padding to a capacity.

Rows are pairs sorted by expert, and each expert's rows are padded to whole blocks, so that a block
has one expert. On CPU a loop over the blocks in use (a trip count known only at run time) computes
the whole MLP of a block at once. Its backward pass is written here, because jax has no reverse-mode
gradient of such a loop, and adds weight gradients in place. On TPU the same rows go through
`jax.lax.ragged_dot`, which has a kernel there; elsewhere ragged_dot multiplies every row by every
expert. NVIDIA GPUs have the kernels of `grouped_gpu`, without a loop: there the host would read its
length at every turn.

Axes: N tokens, P pairs, R rows, E experts, D width, F hidden width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jaxtyping import Array, Float, Int

from common_jax.nn.mlp import gelu
from m2mkd_jax.moe import grouped_gpu
from m2mkd_jax.moe.grouped_gpu import TILE, Tiles
from m2mkd_jax.moe.routers import rank_in_expert


class Experts(NamedTuple):
    """Parameters of all experts: up `[E,D,F]`, up_bias `[E,F]`, down `[E,F,D]`, down_bias `[E,D]`.

    An expert is x -> gelu(x up + up_bias) down + down_bias, with the exact (erf) gelu.
    """

    up: Array
    up_bias: Array
    down: Array
    down_bias: Array


class Rows(NamedTuple):
    """The row of every pair; R = blocks * block rows, a static number, of which the first are used.

    token: `[R]` int32; an empty row has a unique number beyond the last token.
    pair: `[R]` int32, likewise.
    expert: `[blocks]` int32, the expert of each block.
    sizes: `[E]` int32, rows of each expert in whole blocks; they sum to the rows in use.
    """

    token: Array
    pair: Array
    expert: Array
    sizes: Array

    @property
    def block(self) -> int:
        return self.token.shape[0] // self.expert.shape[0]


# The cost of a block in rows, and the rows of the smallest and the largest block. A block reads and
# writes its expert's matrices once, which costs about as much as 16 rows of products (measured on
# CPU). On a GPU its kernels are started and the host reads the loop's length: 0.1 ms, the time of
# 1,000 rows (measured on an H200).
BLOCK_COSTS = {"gpu": (1024, 256, 2048), "default": (16, 8, 256)}


def block_size(pairs: int, experts: int, platform: str = "cpu") -> int:
    """Rows per block of the loop: sqrt(2 * cost * pairs per expert), down to a power of two.

    The last block of an expert is half empty on average. The products then cost
    (mean / block + 1 / 2) * (block + cost), which has its minimum at sqrt(2 * cost * mean).
    """
    cost, least, most = BLOCK_COSTS.get(platform, BLOCK_COSTS["default"])
    mean = max(1.0, pairs / experts)
    return min(most, max(least, 2 ** int(math.log2(2 * cost * mean) / 2)))


def block_for_target(pairs: int, experts: int, *, dtype: jnp.dtype, width: int, hidden: int) -> int:
    """Rows per block for the devices of the mesh, or without one for those of this process.

    A block of `TILE` rows is for the kernels, if the program is compiled for an NVIDIA GPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if _has_triton(device.device_kind) and grouped_gpu.fits(dtype, TILE, width, hidden):
        return TILE
    return block_size(pairs, experts, device.platform)


def _has_triton(kind: str) -> bool:
    """True for NVIDIA's GPUs of compute capability 8.0 and later, for which Triton compiles."""
    # A kind of which there is none here is compiled for without a card, where it takes 8.0 as well.
    here = next((device for device in jax.devices() if device.device_kind == kind), None)
    return "NVIDIA" in kind and float(getattr(here, "compute_capability", 8.0)) >= 8


def arrange(
    token: Int[Array, " P"], expert: Int[Array, " P"], *, tokens: int, experts: int, block: int
) -> Rows:
    """Rows for the pairs of experts 0..experts-1; pairs of other experts get none."""
    pairs = expert.shape[0]
    # Shapes are static, so this is the worst case: every expert leaves one block partly empty.
    blocks = pairs // block + experts
    # A counting sort: the rank within an expert, plus the rows of the experts before it.
    rank, sizes = rank_in_expert(expert, experts)
    used = -(-sizes // block)  # blocks, rounded up
    ends = jnp.cumsum(used)
    first = jnp.take((ends - used) * block, expert, mode="clip")
    row = jnp.where((expert >= 0) & (expert < experts), first + rank, blocks * block)
    # Empty rows get numbers that are unique, as `unique_indices` promises below, and out of bounds,
    # so that they read zeros and write nothing.
    empty = jnp.arange(blocks * block, dtype=jnp.int32)
    number = jnp.arange(blocks)[:, None]
    return Rows(
        token=(tokens + empty).at[row].set(token, mode="drop"),
        pair=(pairs + empty).at[row].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop"),
        # A block is of the first expert whose blocks end after it; unused blocks get the last.
        expert=jnp.minimum(jnp.sum(ends <= number, axis=1), experts - 1).astype(jnp.int32),
        sizes=(used * block).astype(jnp.int32),
    )


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _pick(values: Array, index: Int[Array, " R"]) -> Array:
    return values.at[index].get(mode="fill", fill_value=0)


def _add(total: Array, index: Int[Array, " R"], rows: Array, *, unique: bool) -> Array:
    return total.at[index].add(rows, mode="drop", unique_indices=unique)


def _sum_by_token(x: Float[Array, "N D"], rows: Rows, values: Float[Array, "R D"]) -> Array:
    """Of all rows, in the dtype of `values` and returned in that of `x`."""
    # Not unique here: a token has a row with each of its experts.
    total = _add(jnp.zeros(x.shape, values.dtype), rows.token, values, unique=False)
    return total.astype(x.dtype)


def _by_pair(weight: Float[Array, " P"], rows: Rows, values: Float[Array, " R"]) -> Array:
    """The values of the rows of pairs, 0 for pairs without a row."""
    return _add(jnp.zeros_like(weight), rows.pair, values.astype(weight.dtype), unique=True)


# Forward and backward pass for the rows of one block or for all of them. `experts` has matrices
# that `times` accepts, and biases that broadcast over the rows.


def _forward_rows(x: Float[Array, "R D"], experts: Experts, times: Callable) -> tuple[Array, Array]:
    hidden = (times(x, experts.up) + experts.up_bias).astype(x.dtype)
    active = gelu(hidden.astype(_accumulator(x.dtype)))
    return hidden, times(active.astype(x.dtype), experts.down) + experts.down_bias


class Products(NamedTuple):
    """The products of the backward pass: rows by a transposed matrix, rows by rows, sums."""

    times: Callable
    outer: Callable
    total: Callable


def _backward_rows(
    x: Float[Array, "R D"],
    hidden: Float[Array, "R F"],
    dy: Float[Array, "R D"],
    weight: Float[Array, " R"],
    experts: Experts,
    products: Products,
) -> tuple[Array, Array, Experts]:
    """Gradients of sum(weight * mlp(x) * dy) by x, weight and the experts' parameters."""
    # The gelu is recomputed from the saved hidden values, which halves the saved memory.
    wide = hidden.astype(_accumulator(x.dtype))
    cdf = 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5)))
    slope = cdf + wide * jnp.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    active = wide * cdf
    # back is the gradient by `active` without the weight. Its product with `active` gives the
    # weight's gradient, so the outputs of the forward pass need not be saved.
    back = products.times(dy, experts.down)
    dweight = jnp.sum(active * back, axis=-1) + jnp.sum(dy * experts.down_bias, axis=-1)
    dhidden = (weight[:, None] * back * slope).astype(x.dtype)
    dout = (weight[:, None] * dy).astype(x.dtype)
    gradient = Experts(
        up=products.outer(x, dhidden),
        up_bias=products.total(dhidden),
        down=products.outer(active.astype(x.dtype), dout),
        down_bias=products.total(dout),
    )
    return products.times(dhidden, experts.up), dweight, gradient


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=_accumulator(a.dtype))


def _block_forward(
    x: Float[Array, "N D"], weight: Float[Array, " P"], experts: Experts, rows: Rows
) -> tuple[Float[Array, "N D"], Float[Array, "R F"]]:
    block = rows.block
    row_weight = _pick(weight, rows.pair)

    # A block's rows are gathered, multiplied and added to y at once, so there is no array of all
    # rows of width D; XLA updates the carry in place.
    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        y, saved = carry
        token = jax.lax.dynamic_slice_in_dim(rows.token, i * block, block)
        w = jax.lax.dynamic_slice_in_dim(row_weight, i * block, block)
        one = jax.tree.map(lambda leaf: leaf[rows.expert[i]], experts)
        hidden, out = _forward_rows(_pick(x, token), one, partial(_dot, contract=(1, 0)))
        # An expert has a token at most once, so the tokens of a block are unique.
        y = _add(y, token, (w[:, None] * out).astype(y.dtype), unique=True)
        return y, jax.lax.dynamic_update_slice_in_dim(saved, hidden, i * block, 0)

    # The trip count is dynamic: unused blocks cost memory in `saved`, but no time.
    y = jnp.zeros(x.shape, _accumulator(x.dtype))
    saved = jnp.zeros((rows.token.shape[0], experts.up.shape[-1]), x.dtype)
    y, saved = jax.lax.fori_loop(0, jnp.sum(rows.sizes) // block, body, (y, saved))
    return y.astype(x.dtype), saved


def _block_backward(
    x: Float[Array, "N D"],
    weight: Float[Array, " P"],
    experts: Experts,
    rows: Rows,
    saved: Float[Array, "R F"],
    dy: Float[Array, "N D"],
) -> tuple[Float[Array, "N D"], Float[Array, " P"], Experts]:
    block = rows.block
    row_weight = _pick(weight, rows.pair)
    products = Products(
        times=partial(_dot, contract=(1, 1)),
        outer=partial(_dot, contract=(0, 0)),
        total=lambda a: jnp.sum(a, axis=0, dtype=_accumulator(a.dtype)),
    )

    def body(i: Array, carry: tuple[Array, Array, Experts]) -> tuple[Array, Array, Experts]:
        dx, dweight, dexperts = carry
        token, pair, w, hidden = (
            jax.lax.dynamic_slice_in_dim(leaf, i * block, block)
            for leaf in (rows.token, rows.pair, row_weight, saved)
        )
        expert = rows.expert[i]
        one = jax.tree.map(lambda leaf: leaf[expert], experts)
        dx_rows, dw, d_one = _backward_rows(
            _pick(x, token), hidden, _pick(dy, token), w, one, products
        )
        return (
            _add(dx, token, dx_rows, unique=True),
            _add(dweight, pair, dw.astype(dweight.dtype), unique=True),
            # Only this block's expert is read and written, not the gradients of all experts.
            jax.tree.map(lambda total, part: total.at[expert].add(part), dexperts, d_one),
        )

    start = jax.tree.map(lambda a: jnp.zeros(a.shape, _accumulator(a.dtype)), (x, weight, experts))
    end = jax.lax.fori_loop(0, jnp.sum(rows.sizes) // block, body, start)
    return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), end, (x, weight, experts))


def _ragged(
    a: Array, b: Array, sizes: Int[Array, " E"], contract: tuple[int, int], groups: list[int]
) -> Array:
    dims = RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=groups,
    )
    return jax.lax.ragged_dot_general(
        a, b, sizes, dims, preferred_element_type=_accumulator(a.dtype)
    )


def _for_all_rows(experts: Experts, rows: Rows) -> Experts:
    # ragged_dot selects matrices by the sizes; biases are repeated row by row.
    expert = jnp.repeat(rows.expert, rows.block)
    return experts._replace(up_bias=experts.up_bias[expert], down_bias=experts.down_bias[expert])


def _ragged_forward(
    x: Float[Array, "N D"], weight: Float[Array, " P"], experts: Experts, rows: Rows
) -> tuple[Float[Array, "N D"], Float[Array, "R F"]]:
    def times(a: Array, b: Array) -> Array:
        return _ragged(a, b, rows.sizes, (1, 1), [0])

    hidden, out = _forward_rows(_pick(x, rows.token), _for_all_rows(experts, rows), times)
    out = _pick(weight, rows.pair)[:, None] * out
    y = _sum_by_token(x, rows, out.astype(_accumulator(x.dtype)))
    # ragged_dot leaves rows beyond those in use undefined.
    used = (jnp.arange(hidden.shape[0]) < jnp.sum(rows.sizes))[:, None]
    return y, jnp.where(used, hidden, 0)


def _ragged_backward(
    x: Float[Array, "N D"],
    weight: Float[Array, " P"],
    experts: Experts,
    rows: Rows,
    saved: Float[Array, "R F"],
    dy: Float[Array, "N D"],
) -> tuple[Float[Array, "N D"], Float[Array, " P"], Experts]:
    def outer(a: Array, b: Array) -> Array:
        return _ragged(a, b, rows.sizes, (0, 0), [])

    # Unused rows of ragged_dot may be NaN, which a weight of 0 would not make 0.
    used = (jnp.arange(saved.shape[0]) < jnp.sum(rows.sizes))[:, None]

    def times(a: Array, b: Array) -> Array:
        return jnp.where(used, _ragged(a, b, rows.sizes, (1, 2), [0]), 0)

    products = Products(
        times=times,
        outer=outer,
        # Sums per expert are a product with ones, the only grouped reduction.
        total=lambda a: outer(jnp.ones((a.shape[0], 1), a.dtype), a)[:, 0],
    )
    dx_rows, dw, dexperts = _backward_rows(
        _pick(x, rows.token),
        saved,
        _pick(dy, rows.token),
        _pick(weight, rows.pair),
        _for_all_rows(experts, rows),
        products,
    )
    dexperts = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), dexperts, experts)
    return _sum_by_token(x, rows, dx_rows), _by_pair(weight, rows, dw), dexperts


def tiles_of(rows: Rows) -> Tiles:
    """The blocks of rows as tiles of the kernels."""
    used = jnp.sum(rows.sizes, keepdims=True, dtype=jnp.int32) // rows.block
    return Tiles(expert=rows.expert, used=used)


def _kernel_forward(
    x: Float[Array, "N D"], weight: Float[Array, " P"], experts: Experts, rows: Rows
) -> tuple[Float[Array, "N D"], Float[Array, "R F"]]:
    if not grouped_gpu.fits(x.dtype, rows.block, *experts.up.shape[1:]):
        return _block_forward(x, weight, experts, rows)
    tiles = tiles_of(rows)
    hidden, active = grouped_gpu.forward_up(
        _pick(x, rows.token), experts.up, experts.up_bias, tiles
    )
    out = grouped_gpu.forward_down(
        active, experts.down, experts.down_bias, _pick(weight, rows.pair), tiles
    )
    return _sum_by_token(x, rows, out), hidden


def _kernel_backward(
    x: Float[Array, "N D"],
    weight: Float[Array, " P"],
    experts: Experts,
    rows: Rows,
    saved: Float[Array, "R F"],
    dy: Float[Array, "N D"],
) -> tuple[Float[Array, "N D"], Float[Array, " P"], Experts]:
    if not grouped_gpu.fits(x.dtype, rows.block, *experts.up.shape[1:]):
        return _block_backward(x, weight, experts, rows, saved, dy)
    tiles = tiles_of(rows)
    dy_rows = _pick(dy, rows.token)
    row_weight = _pick(weight, rows.pair)
    dhidden, active, dweight_parts, dbias_parts = grouped_gpu.backward_down(
        dy_rows, experts.down, saved, row_weight, tiles
    )
    dx_rows = grouped_gpu.backward_up(dhidden, experts.up, tiles)

    # Tiles beyond those in use are undefined, and belong to no expert.
    expert = jnp.where(tiles.in_use(), tiles.expert, len(experts.up))

    def total(parts: Array) -> Array:
        start = jnp.zeros((len(experts.up), parts.shape[-1]), parts.dtype)
        return _add(start, expert, parts, unique=False)

    by_tile = dy_rows.astype(jnp.float32).reshape(-1, TILE, dy.shape[-1])
    down_bias = experts.down_bias[tiles.expert][:, None]
    dw = jnp.sum(dweight_parts, axis=1) + jnp.sum(by_tile * down_bias, axis=-1).reshape(-1)
    gradient = Experts(
        up=grouped_gpu.outer(_pick(x, rows.token), dhidden, rows.sizes, experts.up.dtype),
        up_bias=total(dbias_parts),
        # The weight is with the activations, so that there is no array of weighted rows of dy.
        down=grouped_gpu.outer(active, dy_rows, rows.sizes, experts.down.dtype),
        down_bias=total(jnp.sum(row_weight.reshape(-1, TILE, 1) * by_tile, axis=1)),
    )
    gradient = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), gradient, experts)
    return _sum_by_token(x, rows, dx_rows), _by_pair(weight, rows, dw), gradient


class Engine(NamedTuple):
    """An implementation: forward returns (y, saved), backward takes saved and dy."""

    forward: Callable
    backward: Callable


BLOCKWISE = Engine(_block_forward, _block_backward)
RAGGED = Engine(_ragged_forward, _ragged_backward)
KERNELS = Engine(_kernel_forward, _kernel_backward)

# By the platform that the program is compiled for, not the one that compiles it.
ENGINES = {"tpu": RAGGED, "cuda": KERNELS, "default": BLOCKWISE}

BY_PLATFORM = Engine(
    *(
        partial(jax.lax.platform_dependent, **dict(zip(ENGINES, functions, strict=True)))
        for functions in zip(*ENGINES.values(), strict=True)
    )
)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_mlp(
    x: Float[Array, "N D"],
    weight: Float[Array, " P"],
    experts: Experts,
    rows: Rows,
    engine: Engine = BY_PLATFORM,
) -> Float[Array, "N D"]:
    """y_n = sum over the pairs p of token n that have a row of weight_p * expert_p(x_n).

    The result has the dtype of x; products and sums are in float32 at least. The backward pass
    needs the hidden values before the gelu: R * F numbers of x's dtype, with R for the worst
    routing (under `jax.checkpoint` for one layer at a time).
    """
    return engine.forward(x, weight, experts, rows)[0]


def _grouped_forward(
    x: Array, weight: Array, experts: Experts, rows: Rows, engine: Engine
) -> tuple[Array, tuple]:
    y, saved = engine.forward(x, weight, experts, rows)
    return y, (x, weight, experts, rows, saved)


def _grouped_backward(engine: Engine, residuals: tuple, dy: Array) -> tuple:
    return (*engine.backward(*residuals, dy), None)


grouped_mlp.defvjp(_grouped_forward, _grouped_backward)
