"""The expert MLPs on tokens sorted by expert, without padding to a capacity.

Rows are pairs sorted by expert, and each expert's rows are padded to whole blocks, so that every
block belongs to one expert. On CPUs, a loop over the blocks in use, with a trip count known only at
run time, computes the whole MLP one block at a time. Its backward pass is hand-written, since JAX
cannot reverse-differentiate such a loop, and accumulates weight gradients in place. On TPUs the
same rows go through `jax.lax.ragged_dot`, which has a kernel there; elsewhere ragged_dot multiplies
every row by every expert. NVIDIA GPUs use the kernels of `grouped_gpu` instead of a loop, for which
the host would have to read the trip count in every iteration.

Axes: N tokens, P pairs, R rows, E experts, D width, F hidden width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from common_jax.nn.mlp import gelu
from m2mkd_jax.moe import grouped_gpu
from m2mkd_jax.moe.grouped_gpu import TILE, Tiles
from m2mkd_jax.moe.ragged import ragged_product
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
    """The assignment of pairs to rows; R = blocks * block rows is static, and used rows come first.

    token: `[R]` int32, token of each row; for an empty row a unique number past the last token.
    pair: `[R]` int32, pair of each row, likewise.
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


# The fixed cost of a block, in rows, and the smallest and largest block. A block reads and writes
# its expert's matrices once, which costs about as much as multiplying 16 rows (measured on a CPU).
# On a GPU its kernels are launched and the host reads the trip count: 0.1 ms, as long as 1,000 rows
# take (measured on an H200).
BLOCK_COSTS = {"gpu": (1024, 256, 2048), "default": (16, 8, 256)}


def block_size(pairs: int, experts: int, platform: str = "cpu") -> int:
    """Rows per block of the loop: sqrt(2 * cost * pairs per expert), down to a power of two.

    The last block of an expert is half empty on average. The products then cost
    (mean / block + 1 / 2) * (block + cost), which is minimal at sqrt(2 * cost * mean).
    """
    cost, least, most = BLOCK_COSTS.get(platform, BLOCK_COSTS["default"])
    mean = max(1.0, pairs / experts)
    return min(most, max(least, 2 ** int(math.log2(2 * cost * mean) / 2)))


def block_for_target(pairs: int, experts: int, *, dtype: jnp.dtype, width: int, hidden: int) -> int:
    """Rows per block for the devices of the mesh, or without a mesh for those of this process.

    If the program is compiled for an NVIDIA GPU, a block of `TILE` rows selects the kernels.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if _has_triton(device.device_kind) and grouped_gpu.fits(dtype, TILE, width, hidden):
        return TILE
    return block_size(pairs, experts, device.platform)


def _has_triton(kind: str) -> bool:
    """True for NVIDIA GPUs of compute capability 8.0 and later, which Triton compiles for."""
    # If there is no device of this kind here, the program is compiled without a card; assume 8.0.
    here = next((device for device in jax.devices() if device.device_kind == kind), None)
    return "NVIDIA" in kind and float(getattr(here, "compute_capability", 8.0)) >= 8


def arrange(
    token: Int[Array, " P"], expert: Int[Array, " P"], *, tokens: int, experts: int, block: int
) -> Rows:
    """Assigns rows to the pairs of experts 0..experts-1; pairs of other experts get none."""
    pairs = expert.shape[0]
    # Shapes are static, so allow for the worst case: every expert has one partly empty block.
    blocks = pairs // block + experts
    # A counting sort: a pair's row is its rank within its expert, after all earlier experts' rows.
    rank, sizes = rank_in_expert(expert, experts)
    used = -(-sizes // block)  # blocks, rounded up
    ends = jnp.cumsum(used)
    first = jnp.take((ends - used) * block, expert, mode="clip")
    row = jnp.where((expert >= 0) & (expert < experts), first + rank, blocks * block)
    # Empty rows get numbers that are unique, as `unique_indices` below requires, and out of bounds,
    # so that they read zeros and write nothing.
    empty = jnp.arange(blocks * block, dtype=jnp.int32)
    number = jnp.arange(blocks)[:, None]
    return Rows(
        token=(tokens + empty).at[row].set(token, mode="drop"),
        pair=(pairs + empty).at[row].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop"),
        # A block belongs to the first expert whose blocks end after it; unused ones get the last.
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
    """Sums rows by token, in the dtype of `values`; the result has the dtype of `x`."""
    # Not unique here: a token has one row for each of its experts.
    total = _add(jnp.zeros(x.shape, values.dtype), rows.token, values, unique=False)
    return total.astype(x.dtype)


def _by_pair(weight: Float[Array, " P"], rows: Rows, values: Float[Array, " R"]) -> Array:
    """The value of each pair's row, 0 for pairs without a row."""
    return _add(jnp.zeros_like(weight), rows.pair, values.astype(weight.dtype), unique=True)


# Forward and backward pass for the rows of one block, or for all rows. `experts` holds matrices
# that `times` accepts, and biases that broadcast over the rows.


def _forward_rows(x: Float[Array, "R D"], experts: Experts, times: Callable) -> tuple[Array, Array]:
    hidden = (times(x, experts.up) + experts.up_bias).astype(x.dtype)
    active = gelu(hidden.astype(_accumulator(x.dtype)))
    return hidden, times(active.astype(x.dtype), experts.down) + experts.down_bias


class Products(NamedTuple):
    """The products of the backward pass: rows times a transposed matrix, rows times rows, sums."""

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
    """Gradients of sum(weight * mlp(x) * dy) w.r.t. x, weight and the experts' parameters."""
    # The gelu is recomputed from the saved hidden values, which halves the saved memory.
    wide = hidden.astype(_accumulator(x.dtype))
    cdf = 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5)))
    slope = cdf + wide * jnp.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    active = wide * cdf
    # `back` is the gradient of `active`, before the weight. Its product with `active` gives the
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

    # A block's rows are gathered, multiplied and added to y right away, so that no array of all
    # rows of width D exists; XLA updates the carry in place.
    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        y, saved = carry
        token = jax.lax.dynamic_slice_in_dim(rows.token, i * block, block)
        w = jax.lax.dynamic_slice_in_dim(row_weight, i * block, block)
        one = jax.tree.map(lambda leaf: leaf[rows.expert[i]], experts)
        hidden, out = _forward_rows(_pick(x, token), one, partial(_dot, contract=(1, 0)))
        # An expert gets a token at most once, so the tokens of a block are unique.
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
            # Reads and writes the gradient of this block's expert only, not of all experts.
            jax.tree.map(lambda total, part: total.at[expert].add(part), dexperts, d_one),
        )

    start = jax.tree.map(lambda a: jnp.zeros(a.shape, _accumulator(a.dtype)), (x, weight, experts))
    end = jax.lax.fori_loop(0, jnp.sum(rows.sizes) // block, body, start)
    return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), end, (x, weight, experts))


def _ragged(
    a: Array, b: Array, sizes: Int[Array, " E"], contract: tuple[int, int], groups: list[int]
) -> Array:
    dtype = _accumulator(a.dtype)
    return ragged_product(a, b, sizes, contract=contract, groups=groups, dtype=dtype)


def _for_all_rows(experts: Experts, rows: Rows) -> Experts:
    # ragged_dot selects matrices by group size, but biases have to be repeated for every row.
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
    # ragged_dot leaves unused rows undefined.
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

    # Unused rows of ragged_dot may be NaN, which a weight of 0 does not turn into 0.
    used = (jnp.arange(saved.shape[0]) < jnp.sum(rows.sizes))[:, None]

    def times(a: Array, b: Array) -> Array:
        return jnp.where(used, _ragged(a, b, rows.sizes, (1, 2), [0]), 0)

    products = Products(
        times=times,
        outer=outer,
        # Sums per expert as a product with ones, since there is no other grouped reduction.
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

    # Unused tiles are undefined, so they are assigned to no expert.
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
        # `active` already includes the weight, so that no array of weighted dy rows is needed.
        down=grouped_gpu.outer(active, dy_rows, rows.sizes, experts.down.dtype),
        down_bias=total(jnp.sum(row_weight.reshape(-1, TILE, 1) * by_tile, axis=1)),
    )
    gradient = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), gradient, experts)
    return _sum_by_token(x, rows, dx_rows), _by_pair(weight, rows, dw), gradient


class Engine(NamedTuple):
    """An implementation: `forward` returns (y, saved), `backward` takes saved and dy."""

    forward: Callable
    backward: Callable


BLOCKWISE = Engine(_block_forward, _block_backward)
RAGGED = Engine(_ragged_forward, _ragged_backward)
KERNELS = Engine(_kernel_forward, _kernel_backward)

# By the platform that the program is compiled for, which may differ from the one that compiles it.
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
    """y_n = sum of weight_p * expert_p(x_n) over the pairs p of token n that have a row.

    The result has the dtype of x; products and sums are at least in float32. For the backward pass
    the hidden values before the gelu are saved: R * F numbers of x's dtype, with R for the worst
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
