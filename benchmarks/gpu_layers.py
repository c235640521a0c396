"""Cases of `gpu.py`: ceilings, the mixture of experts, attention, and the label loss."""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from gpu_timing import chained, measure, named, precisely, run_case, say, with_gradients
from jax.experimental import pallas as pl

from cliptrans_jax.losses import label_loss, states_loss
from cliptrans_jax.translators.translator import Readout
from common_jax.nn import attention as attentions
from common_jax.nn.mlp import gelu
from m2mkd_jax.moe import grouped, grouped_gpu
from m2mkd_jax.moe.dispatch import capacity
from m2mkd_jax.moe.routers import Routes
from m2mkd_jax.nac import blocks, kernel

DTYPE = jnp.bfloat16


def normal(seed: int, *shape: int, scale: float = 1.0, dtype: Any = DTYPE) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


# Ceilings.


def measure_ceiling(tiny: bool) -> None:
    """Matrix products, a copy, and one iteration of a loop whose length is data."""
    n = 512 if tiny else 8192
    a, b = normal(0, n, n), normal(1, n, n)
    flops = 2 * n**3
    measure("matmul_bf16", jnp.matmul, a, b, flops=flops)
    for precision in ("default", "highest"):
        product = partial(jnp.matmul, precision=precision)
        wide = a.astype(jnp.float32), b.astype(jnp.float32)
        measure(f"matmul_f32_{precision}", product, *wide, flops=flops)

    x = normal(2, 2**20 if tiny else 2**30)
    add = jax.jit(lambda x: x + 1)
    times = chained(lambda: add(x))
    say("copy", **times, gb_s=2 * x.nbytes / times["ms"] / 1e6)

    # The length is an argument, so that the host reads it from the device.
    loop = jax.jit(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x) * 0.5, x))
    ms = {n: chained(lambda n=n: loop(n, jnp.ones(256)), count=1)["ms"] for n in (100, 1100)}
    say("loop_iteration", us=ms[1100] - ms[100], note="one small kernel per iteration")


# Mixtures of experts.


class MoeSizes(NamedTuple):
    tokens: int = 128 * 197
    experts: int = 8
    width: int = 768
    hidden: int = 3072
    chosen: int = 2

    @property
    def pairs(self) -> int:
        return self.tokens * self.chosen

    @property
    def product_flops(self) -> int:
        """FLOPs of one matrix product over all pairs; forward and backward pass take six."""
        return 2 * self.width * self.hidden * self.pairs


def moe_sizes(tiny: bool) -> MoeSizes:
    return MoeSizes(tokens=4 * 17, experts=4, width=64, hidden=128) if tiny else MoeSizes()


class MoeInputs(NamedTuple):
    x: jax.Array
    weight: jax.Array
    experts: grouped.Experts
    token: jax.Array
    expert: jax.Array


def moe_inputs(sizes: MoeSizes) -> MoeInputs:
    """Random tokens and experts, with some experts chosen more often than others."""
    tokens, experts, width, hidden, chosen = sizes
    skew = 0.3 * jnp.arange(experts) / experts
    logits = normal(2, tokens, experts, dtype=jnp.float32) + skew
    best, expert = jax.lax.top_k(logits, chosen)
    return MoeInputs(
        normal(0, tokens, width),
        jax.nn.softmax(best).T.reshape(-1),
        grouped.Experts(
            normal(3, experts, width, hidden, scale=width**-0.5),
            normal(4, experts, hidden, scale=0.1),
            normal(5, experts, hidden, width, scale=hidden**-0.5),
            normal(6, experts, width, scale=0.1),
        ),
        jnp.tile(jnp.arange(tokens, dtype=jnp.int32), chosen),
        expert.T.reshape(-1).astype(jnp.int32),
    )


def interpreted(tiny: bool) -> contextlib.AbstractContextManager:
    """Runs Pallas kernels in interpret mode, on a CPU, if `tiny`."""
    if not tiny:
        return contextlib.nullcontext()
    return mock.patch.object(pl, "pallas_call", partial(pl.pallas_call, interpret=True))


def layer(sizes: MoeSizes, engine: grouped.Engine, block: int) -> Callable[..., Any]:
    """The layer with gradients, including the sorting of its rows by expert."""

    def run(dy, x, weight, experts, token, expert):
        rows = grouped.arrange(
            token, expert, tokens=sizes.tokens, experts=sizes.experts, block=block
        )
        mlp = with_gradients(lambda *a: grouped.grouped_mlp(*a, rows, engine))
        return mlp(dy, x, weight, experts)

    return run


def measure_moe_layer(tiny: bool) -> None:
    """The mixture of experts, forward and backward, against a dense MLP. The reference for errors
    is the block loop."""
    sizes = moe_sizes(tiny)
    inputs, dy = moe_inputs(sizes), normal(1, sizes.tokens, sizes.width)
    flops = 6 * sizes.product_flops

    def dense(x, up, up_bias, down, down_bias):
        return gelu((x @ up + up_bias).astype(jnp.float32)).astype(DTYPE) @ down + down_bias

    twice = [jnp.tile(a, (sizes.chosen, 1)) for a in (dy, inputs.x)]
    one = (leaf[0] for leaf in inputs.experts)
    measure("moe_dense", with_gradients(dense), *twice, *one, flops=flops)

    block = grouped.block_size(sizes.pairs, sizes.experts)
    loop = partial(layer, sizes, grouped.BLOCKWISE)
    right = measure("moe_blockwise", loop(block), dy, *inputs, flops=flops, note=f"{block} rows")
    for rows in (1024, 2048, 4096):
        measure(f"moe_blockwise_{rows}", loop(rows), dy, *inputs, flops=flops, right=right)
    with interpreted(tiny):
        kernels = layer(sizes, grouped.KERNELS, grouped.TILE)
        measure("moe_triton", kernels, dy, *inputs, flops=flops, right=right)

    slots = math.ceil(1.25 * sizes.pairs / sizes.experts)

    def with_capacity(dy, x, weight, experts, token, expert):
        def run(x, weight, experts):
            routes = Routes(token[None], expert[None], weight[None])
            return capacity(x[None], routes, experts, slots)[0][0]

        return with_gradients(run)(dy, x, weight, experts)

    measure("moe_capacity", with_capacity, dy, *inputs, flops=flops, note="drops pairs")
    ragged = layer(sizes, grouped.RAGGED, block)
    measure("moe_ragged_xla", ragged, dy, *inputs, flops=flops, right=right)


# Tiles of a kernel: rows, columns, step along the contracted axis, warps, stages.
TILES = (
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (64, 128, 64, 4, 4),
)
MOSAIC_TILES = ((128, 64, 4), (256, 64, 3), (128, 128, 2))  # columns, step, stages


def measure_moe_kernels(tiny: bool) -> None:
    """Each of the layer's six kernels, the first also with other tiles, and JAX's Mosaic kernel."""
    sizes = moe_sizes(tiny)
    inputs = moe_inputs(sizes)

    def operands(block: int) -> tuple[jax.Array, grouped.Rows, grouped_gpu.Tiles]:
        rows = grouped.arrange(
            inputs.token, inputs.expert, tokens=sizes.tokens, experts=sizes.experts, block=block
        )
        x = inputs.x.at[rows.token].get(mode="fill", fill_value=0)
        return x, rows, grouped.tiles_of(rows)

    x, rows, tiles = operands(grouped.TILE)
    weight = inputs.weight.at[rows.pair].get(mode="fill", fill_value=0)
    dy, hidden = normal(7, *x.shape), normal(8, len(x), sizes.hidden)
    up, up_bias, down, down_bias = inputs.experts
    outer = partial(grouped_gpu.outer, dtype=DTYPE)
    kernels = {
        "forward_up": (grouped_gpu.forward_up, x, up, up_bias, tiles),
        "forward_down": (grouped_gpu.forward_down, hidden, down, down_bias, weight, tiles),
        "backward_down": (grouped_gpu.backward_down, dy, down, hidden, weight, tiles),
        "backward_up": (grouped_gpu.backward_up, hidden, up, tiles),
        "outer_up": (outer, x, hidden, rows.sizes),
        "outer_down": (outer, hidden, dy, rows.sizes),
    }
    run = partial(measure, flops=sizes.product_flops)
    with interpreted(tiny):
        for name, (function, *arguments) in kernels.items():
            run(f"kernel_{name}", function, *arguments)

        names = ("TILE", "COLUMNS", "STEP_BYTES", "WARPS", "STAGES")
        for height, columns, step, warps, stages in TILES:
            values = height, columns, step * x.dtype.itemsize, warps, stages
            other, _, other_tiles = operands(height)
            case = f"gmm_{height}_{columns}_{step}_w{warps}_s{stages}"
            with mock.patch.multiple(grouped_gpu, **dict(zip(names, values, strict=True))):
                product = partial(grouped_gpu.forward_up)  # a new function, to miss jax.jit's cache
                run(case, product, other, up, up_bias, other_tiles)

    if tiny:
        say("mosaic_gmm", error="left out: it cannot be interpreted")
        return
    with named("mosaic_gmm"):
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

        for columns, step, stages in MOSAIC_TILES:
            product = partial(
                ragged_dot_mgpu.ragged_dot,
                group_sizes=rows.sizes,
                block_m=128,
                block_n=columns,
                block_k=step,
                max_concurrent_steps=stages,
                grid_block_n=8,
            )
            run(f"mosaic_gmm_128_{columns}_{step}_s{stages}", product, x, up)


# Attention.


class Shape(NamedTuple):
    """Shape of an attention.

    visible: which keys a query sees: "all", those under a "causal" mask, or those with edges, whose
      log affinities are added to the scores: "shared" by all examples, or of "each" example.
    """

    batch: int
    tokens: int
    heads: int
    visible: str = "all"
    width: int = 64  # per head


SHAPES = {
    "vitl_128x197": Shape(128, 197, 16),
    "vitl_198": Shape(128, 198, 16),
    "nac_64x768": Shape(64, 768, 8),
    "nac_edges_64x768": Shape(64, 768, 8, "each"),
    "nac_shared_edges_64x768": Shape(64, 768, 8, "shared"),
    "mbart_32x64": Shape(32, 64, 16, "causal"),
}


def log_affinities(shape: Shape) -> jax.Array:
    """Log affinities of a NAC's edges. Shared edges are cut beyond a distance (minus infinity), and
    the first receiver has none. Edges of each example are sampled, as in training."""
    key, other = jax.random.split(jax.random.key(8))
    distance = jax.random.uniform(key, (shape.tokens, shape.tokens), maxval=1.2).at[0].set(1.5)
    logs = kernel.log_kernel(distance, 1.0, kernel.KernelConfig())[None]
    if shape.visible == "shared":
        return logs
    uniform = jax.random.uniform(other, (shape.batch, *distance.shape))
    return kernel.sample_log(logs, uniform, temperature=0.5)


def attend(shape: Shape, attention: str) -> Callable[..., jax.Array]:
    """One implementation of attention, a function of query, keys, values and log affinities."""
    if shape.visible in ("each", "shared"):
        width = shape.heads * shape.width
        config = blocks.BlockConfig(
            width, width, shape.heads, shape.width,
            kernel=kernel.KernelConfig(), attention=attention,
        )  # fmt: skip
        return partial(blocks.attend, config=config)
    whole = jnp.ones((1, 1, shape.tokens, shape.tokens), bool)
    visible = jnp.tril(whole) if shape.visible == "causal" else None
    return lambda query, keys, values: attentions.attend(
        query, keys, values, visible, attention=attention
    )


def attention_flops(shape: Shape) -> int:
    """Model FLOPs of an attention with its gradients: six products of 2 B H T S K. Two are forward,
    scores and output; four are backward, the gradients of weights, values, queries and keys. Masked
    scores count. Those that a fused backward pass computes again do not: seven products are run."""
    batch, tokens, heads, _, width = shape
    return 6 * 2 * batch * heads * tokens**2 * width


@contextlib.contextmanager
def by_xla(tiny: bool) -> Iterator[None]:
    """Under `tiny`, lets XLA compute the attention that cuDNN would."""

    def choose(attention: str, forms: dict[str, Callable], *operands: Any) -> jax.Array:
        return forms[attention](*operands)

    fused = partial(attentions.fused, implementation="xla")
    with contextlib.ExitStack() as stack:
        for module in (attentions, blocks) if tiny else ():
            stack.enter_context(mock.patch.multiple(module, by_platform=choose, fused=fused))
        yield


def measure_attention(tiny: bool) -> None:
    """XLA's attention and cuDNN's: values and gradients, including those of log affinities. The
    reference for errors is XLA's in float32."""
    for name, shape in SHAPES.items():
        if tiny:
            shape = shape._replace(batch=2, tokens=16 + shape.tokens % 2)
        whole = shape.batch, shape.tokens, shape.heads, shape.width
        operands = [normal(seed, *whole) for seed in range(3)]
        if shape.visible in ("each", "shared"):
            operands.append(log_affinities(shape))
        dy = normal(3, *whole)
        flops = attention_flops(shape)
        with by_xla(tiny):
            right = precisely(with_gradients(attend(shape, "xla")), dy, *operands)
            for how in ("xla", "cudnn"):
                run = with_gradients(attend(shape, how))
                measure(f"attention_{name}_{how}", run, dy, *operands, flops=flops, right=right)


# The label loss.


def measure_label_loss(tiny: bool) -> None:
    """The label loss of an mBART micro-batch, in blocks and with all logits in memory: values, and
    gradients of embeddings and states. The reference for errors is the latter in float32."""
    examples, tokens, vocab, width = (2, 8, 1000, 64) if tiny else (32, 64, 250_054, 1024)
    pad = 1
    matrix = normal(0, vocab, width, scale=width**-0.5, dtype=jnp.float32)
    states = normal(1, examples, tokens, width)
    labels = jax.random.randint(jax.random.key(2), (examples, tokens), 2, vocab)
    labels = labels.at[:, -tokens // 8 :].set(pad)

    def in_blocks(matrix, states):
        return states_loss(Readout(matrix), states, labels, pad=pad)[0]

    def plainly(matrix, states):
        low = matrix.astype(states.dtype)
        logits = jnp.matmul(states, low.T, preferred_element_type=jnp.float32)
        return label_loss(logits, labels, pad=pad)[0]

    given = jnp.ones(()), matrix, states
    flops = 6 * examples * tokens * vocab * width
    right = precisely(with_gradients(plainly), *given)
    for name, function in (("blocks", in_blocks), ("plain", plainly)):
        measure(f"label_loss_{name}", with_gradients(function), *given, flops=flops, right=right)


CASES = {
    "ceiling": measure_ceiling,
    "moe_layer": measure_moe_layer,
    "moe_kernels": measure_moe_kernels,
    "attention": measure_attention,
    "label_loss": measure_label_loss,
}

if __name__ == "__main__":
    run_case(CASES)
