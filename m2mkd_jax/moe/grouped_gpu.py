"""The experts' products on NVIDIA GPUs: Pallas-Triton kernels on rows sorted by expert.

A kernel is launched over the tiles of its result, one program per tile. Rows come in tiles of
`TILE`, each of which belongs to one expert. Unused tiles are never written, so their contents are
undefined. Products accumulate in float32, and the epilogue (bias, GELU, weight, slope) is applied
to the accumulator before it is stored.

Axes: R rows, E experts, D width, F hidden width; K and N stand for D or F, whichever way round.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

TILE = 128  # rows
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

# With 8 warps and 128 columns a thread accumulates 64 numbers, which leaves registers for the
# epilogues; 4 warps or 256 columns spill (docs/gpu.md). A step along the contracted axis is one
# line of shared memory, so three stages take 96 KB in float32 just as in bfloat16.
COLUMNS, LEAST_COLUMNS = 128, 64
STEP_BYTES = 128
WARPS = 8
STAGES = 3
# Rows of tiles that neighbouring programs compute, so that they share the column operand in L2.
NEIGHBOURS = 8

# Pallas-Triton has no erf. The tail of the normal distribution is P(X > x) = t p(t) exp(-x^2 / 2)
# for x >= 0, with t = 1 / (1 + RATE x). The coefficients of p, constant term first, are a minimax
# fit with an error of 1.1e-8; in float32 the result is within 2^-22 of the exact value.
RATE = 0.275
TAIL = (0.11757350632, 0.04359687438, 0.33021892770, -0.32638798417, 0.44916413660, -0.11416545016)
DENSITY = 1 / math.sqrt(2 * math.pi)


class Tiles(NamedTuple):
    """The tiles of rows: the expert of each, and how many are in use. Used tiles come first.

    expert: `[R / TILE]` int32.
    used: `[1]` int32.
    """

    expert: Int[Array, " tiles"]
    used: Int[Array, "1"]

    def in_use(self) -> Array:
        """`[R / TILE]`, true for the tiles in use."""
        return jnp.arange(self.expert.shape[0]) < self.used


def fits(dtype: jnp.dtype, block: int, width: int, hidden: int) -> bool:
    """True if the kernels can be used: blocks are tiles, widths are whole tiles of columns, and
    tensor cores support the dtype."""
    whole = width % LEAST_COLUMNS == hidden % LEAST_COLUMNS == 0
    return block == TILE and whole and dtype in DTYPES


def forward_up(
    x: Float[Array, "R D"], up: Float[Array, "E D F"], bias: Float[Array, "E F"], tiles: Tiles
) -> tuple[Float[Array, "R F"], Float[Array, "R F"]]:
    """hidden = x up + bias with each row's expert, and gelu(hidden)."""
    outputs = [jax.ShapeDtypeStruct((x.shape[0], up.shape[2]), x.dtype)] * 2
    return _rows_by_matrices(_activate, x, up, (bias,), outputs, tiles)


def forward_down(
    active: Float[Array, "R F"],
    down: Float[Array, "E F D"],
    bias: Float[Array, "E D"],
    weight: Float[Array, " R"],
    tiles: Tiles,
) -> Float[Array, "R D"]:
    """weight * (active down + bias) with each row's expert, in float32."""
    outputs = [jax.ShapeDtypeStruct((active.shape[0], down.shape[2]), jnp.float32)]
    return _rows_by_matrices(_weigh, active, down, (bias, weight), outputs, tiles)[0]


def backward_down(
    dy: Float[Array, "R D"],
    down: Float[Array, "E F D"],
    hidden: Float[Array, "R F"],
    weight: Float[Array, " R"],
    tiles: Tiles,
) -> tuple[
    Float[Array, "R F"],
    Float[Array, "R F"],
    Float[Array, "R columns"],
    Float[Array, "tiles F"],
]:
    """Four arrays from back = dy down^T, the gradient of gelu(hidden) before weighting.

    Returns:
      weight * back * gelu'(hidden), the gradient of `hidden`.
      weight * gelu(hidden), whose products with `dy` are the gradient of `down`.
      back * gelu(hidden), summed over the columns of each tile: a part of the gradient of `weight`.
      The first array, summed over the rows of each tile: a part of the gradient of the `up` bias.
    """
    rows, width = hidden.shape
    outputs = [
        jax.ShapeDtypeStruct((rows, width), dy.dtype),
        jax.ShapeDtypeStruct((rows, width), dy.dtype),
        jax.ShapeDtypeStruct((rows, width // _columns(width)), jnp.float32),
        jax.ShapeDtypeStruct((rows // TILE, width), jnp.float32),
    ]
    return _rows_by_matrices(_slope, dy, down, (hidden, weight), outputs, tiles, transposed=True)


def backward_up(
    dhidden: Float[Array, "R F"], up: Float[Array, "E D F"], tiles: Tiles
) -> Float[Array, "R D"]:
    """dhidden up^T with each row's expert, in float32."""
    outputs = [jax.ShapeDtypeStruct((dhidden.shape[0], up.shape[1]), jnp.float32)]
    return _rows_by_matrices(_store, dhidden, up, (), outputs, tiles, transposed=True)[0]


def outer(
    a: Float[Array, "R K"], b: Float[Array, "R N"], sizes: Int[Array, " E"], dtype: jnp.dtype
) -> Float[Array, "E K N"]:
    """a^T b, summed over the rows of each expert; `sizes` are the numbers of rows."""
    height, width, experts = a.shape[1], b.shape[1], sizes.shape[0]
    grid = height // _columns(height), width // _columns(width)
    end = jnp.cumsum(sizes).astype(jnp.int32)
    (total,) = _launch(
        partial(_outer_kernel, grid=grid),
        (end - sizes, end, a, b),
        [jax.ShapeDtypeStruct((experts, height, width), dtype)],
        grid=(grid[0] * grid[1], experts),
        flops=2 * a.shape[0] * height * width,
        name="grouped_outer",
    )
    return total


def _launch(
    kernel: Callable,
    operands: tuple[Array, ...],
    outputs: list[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    flops: int,
    name: str,
) -> tuple[Array, ...]:
    """Runs the kernel. Its FLOPs and bytes, assuming that all rows are in use and each array is
    moved once, are recorded in the jaxpr (`cost_estimate`) and the compiled program
    (`metadata`)."""
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *outputs))
    call = pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        metadata={"name": name, "flops": str(flops), "bytes_accessed": str(moved)},
        name=name,
    )
    return tuple(call(*operands))


def _columns(size: int) -> int:
    """Columns of a tile: the largest power of two up to `COLUMNS` that divides `size`."""
    return math.gcd(size, COLUMNS)


def _step(dtype: jnp.dtype) -> int:
    return STEP_BYTES // dtype.itemsize


def _place(program: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """The tile (row, column) of a program: goes down `NEIGHBOURS` rows, then to the next column."""
    first = program // (NEIGHBOURS * columns) * NEIGHBOURS
    count = jnp.minimum(rows - first, NEIGHBOURS)
    within = program % (NEIGHBOURS * columns)
    return first + within % count, within // count


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    # Uses JAX's default precision: TF32 for float32 unless more is requested, as XLA does on GPUs.
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


class _Tile(NamedTuple):
    """The position of a program's tile: its expert, its slices, and its indices."""

    expert: Array
    rows: pl.Slice
    columns: pl.Slice
    row: Array
    column: Array


def _rows_by_matrices(
    epilogue: Callable,
    a: Float[Array, "R K"],
    matrices: Array,
    extras: tuple[Array, ...],
    outputs: list[jax.ShapeDtypeStruct],
    tiles: Tiles,
    *,
    transposed: bool = False,
) -> tuple[Array, ...]:
    """Applies `epilogue` to each row of `a` times its expert's matrix, `[E,K,N]` or, if transposed,
    `[E,N,K]`."""
    rows, inner = a.shape
    width = matrices.shape[1 if transposed else 2]
    grid = rows // TILE, width // _columns(width)
    return _launch(
        partial(_row_kernel, epilogue=epilogue, grid=grid, transposed=transposed),
        (*tiles, a, matrices, *extras),
        outputs,
        grid=(grid[0] * grid[1],),
        flops=2 * rows * inner * width,
        name=f"grouped{epilogue.__name__}",
    )


def _row_kernel(
    expert, used, a, matrices, *refs, epilogue: Callable, grid: tuple[int, int], transposed: bool
) -> None:
    row, column = _place(pl.program_id(0), *grid)
    width = matrices.shape[1 if transposed else 2] // grid[1]
    tile = _Tile(expert[row], pl.ds(row * TILE, TILE), pl.ds(column * width, width), row, column)

    step = _step(a.dtype)

    def add(i: Array, total: Array) -> Array:
        inner = pl.ds(i * step, step)
        if transposed:
            matrix = matrices[tile.expert, tile.columns, inner]
        else:
            matrix = matrices[tile.expert, inner, tile.columns]
        return total + _dot(a[tile.rows, inner], matrix, (1, int(transposed)))

    @pl.when(row < used[0])
    def _():
        # No step is partial: `fits` requires widths in multiples of 64, the largest step.
        start = jnp.zeros((TILE, width), jnp.float32)
        epilogue(jax.lax.fori_loop(0, a.shape[1] // step, add, start), tile, *refs)


def _outer_kernel(start, end, a, b, out, *, grid: tuple[int, int]) -> None:
    row, column = _place(pl.program_id(0), *grid)
    expert = pl.program_id(1)
    height, width = (out.shape[axis + 1] // count for axis, count in enumerate(grid))
    rows, columns = pl.ds(row * height, height), pl.ds(column * width, width)

    step = _step(a.dtype)

    def add(i: Array, total: Array) -> Array:
        inner = pl.ds(i * step, step)
        return total + _dot(a[inner, rows], b[inner, columns], (0, 0))

    # An expert without rows gets zeros.
    total = jnp.zeros((height, width), jnp.float32)
    # No step is partial here either, since an expert's rows are whole tiles of 128.
    total = jax.lax.fori_loop(start[expert] // step, end[expert] // step, add, total)
    out[expert, rows, columns] = total.astype(out.dtype)


def normal_cdf(x: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """The normal distribution's P(X <= x), within 2^-22 in float32, and exp(-x^2 / 2)."""
    decay = jnp.exp(-0.5 * x * x)
    t = 1 / (1 + RATE * jnp.abs(x))
    polynomial = jnp.zeros_like(t)
    for coefficient in reversed(TAIL):
        polynomial = polynomial * t + coefficient
    tail = t * polynomial * decay
    return jnp.where(x < 0, tail, 1 - tail), decay


# Epilogues take the float32 product of a tile, its position, further operands, and outputs.


def _activate(product, tile: _Tile, bias, hidden, active) -> None:
    wide = product + bias[tile.expert, tile.columns].astype(jnp.float32)[None, :]
    hidden[tile.rows, tile.columns] = wide.astype(hidden.dtype)
    # Not rounded to the dtype of `hidden` before the GELU, just as XLA keeps such intermediate
    # results in float32 when it fuses (`xla_allow_excess_precision`).
    active[tile.rows, tile.columns] = (wide * normal_cdf(wide)[0]).astype(active.dtype)


def _weigh(product, tile: _Tile, bias, weight, out) -> None:
    wide = product + bias[tile.expert, tile.columns].astype(jnp.float32)[None, :]
    out[tile.rows, tile.columns] = weight[tile.rows][:, None] * wide


def _slope(product, tile: _Tile, hidden, weight, dhidden, active, dweight, dbias) -> None:
    wide = hidden[tile.rows, tile.columns].astype(jnp.float32)
    share = weight[tile.rows][:, None]
    cdf, decay = normal_cdf(wide)
    slope = cdf + wide * decay * DENSITY
    gradient = share * product * slope
    dhidden[tile.rows, tile.columns] = gradient.astype(dhidden.dtype)
    dbias[tile.row, tile.columns] = jnp.sum(gradient, axis=0)
    gelu = wide * cdf
    active[tile.rows, tile.columns] = (share * gelu).astype(active.dtype)
    dweight[tile.rows, tile.column] = jnp.sum(product * gelu, axis=1)


def _store(product, tile: _Tile, out) -> None:
    out[tile.rows, tile.columns] = product
