"""The mixture-of-experts layer against a dense MLP that does the same useful work.

Every token goes to `--chosen` experts, so the peer is a dense MLP of one expert's size on
`tokens * chosen` rows. Both are timed in turns, forward and backward, with gradients of input and
parameters. The layers include the router. The target is at most 1.5 times the dense MLP's time on
CPU, a ratio of 0.67. The outputs of the two layers that drop no token are compared first.

    python benchmarks/moe_layer.py
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax import Array

from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.moe.grouped import RAGGED, Experts, arrange, block_size, grouped_mlp
from m2mkd_jax.moe.layer import MoeMlp

# Of the largest output: for float32 rounding, and for that of bfloat16.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
TARGETS = {"dropless": 0.67, "capacity": None, "ragged_dot": None}


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__, repeats=9)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--chosen", type=int, default=2, help="experts per token")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden width of an expert")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an example")
    parser.add_argument("--capacity-factor", type=float, default=1.25)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def with_gradients(function: Callable[..., Array], *arguments: object) -> tuple[Callable, tuple]:
    """Compiles y and the gradients of sum(y * dy) with respect to all arguments; returns the
    program and its input."""
    dy = jax.random.normal(jax.random.key(9), jax.eval_shape(function, *arguments).shape)

    def run(arguments: tuple) -> tuple:
        y, vjp = jax.vjp(function, *arguments)
        return y, vjp(dy.astype(y.dtype))

    return jax.jit(run).lower(arguments).compile(), (arguments,)


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads, keep_memory=True)
    pairs = sizes.examples * sizes.tokens * sizes.chosen
    dtype = jnp.dtype(sizes.dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (sizes.examples, sizes.tokens, sizes.width), dtype)
    shared = {"experts": sizes.experts, "chosen": sizes.chosen, "expert_init": "fan_in"}
    configs = {
        "dropless": MoeConfig(dispatch="dropless", **shared),
        "capacity": MoeConfig(dispatch="capacity", capacity_factor=sizes.capacity_factor, **shared),
    }
    layers = {name: MoeMlp(config, sizes.hidden, dtype) for name, config in configs.items()}
    params = layers["dropless"].init(keys[1], x)["params"]
    names = ("up", "up_bias", "down", "down_bias")
    one = [params[name][0].astype(dtype) for name in names]
    rows = jax.random.normal(keys[2], (pairs, sizes.width), dtype)

    _, written = layers["dropless"].apply({"params": params}, x, mutable=["routing", "moe"])
    expert = written["routing"]["expert"].reshape(-1)
    weight = written["routing"]["weight"].reshape(-1)
    block = block_size(pairs, sizes.experts)
    tokens = sizes.examples * sizes.tokens
    layout = arrange(
        jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), sizes.chosen),
        expert,
        tokens=tokens,
        experts=sizes.experts,
        block=block,
    )

    def dense(rows: Array, up: Array, up_bias: Array, down: Array, down_bias: Array) -> Array:
        return jax.nn.gelu(rows @ up + up_bias, approximate=False) @ down + down_bias

    def layer(name: str) -> Callable[..., Array]:
        return lambda params, x: layers[name].apply({"params": params}, x)

    def ragged(x: Array, weight: Array, experts: Experts) -> Array:
        return grouped_mlp(x, weight, experts, layout, RAGGED)

    experts = Experts(*(params[name].astype(dtype) for name in names))
    cases = {
        "dense MLP": with_gradients(dense, rows, *one),
        "dropless": with_gradients(layer("dropless"), params, x),
        "capacity": with_gradients(layer("capacity"), params, x),
        "ragged_dot": with_gradients(ragged, x.reshape(-1, sizes.width), weight, experts),
    }

    dropless, by_ragged_dot = (
        compiled(*arguments)[0] for compiled, arguments in (cases["dropless"], cases["ragged_dot"])
    )
    timing.check_results(by_ragged_dot.reshape(dropless.shape), dropless, TOLERANCES[sizes.dtype])

    # Six products of 2 D F FLOPs per row: two forward, four backward.
    row = 12 * sizes.width * sizes.hidden
    slots = configs["capacity"].slots(tokens) * sizes.experts
    in_rows = int(jnp.sum(layout.sizes))
    flops = {name: compiled.cost_analysis()["flops"] for name, (compiled, _) in cases.items()}
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {sizes.dtype}")
    print(f"{pairs} pairs of {tokens} tokens, {sizes.experts} experts, blocks of {block} rows\n")
    print(f"{'':12s}{'FLOPs / ideal, by XLA':>24s}{'products, by hand':>28s}")
    row_counts = {"dense MLP": pairs, "dropless": in_rows, "capacity": slots}
    for name, count in flops.items():
        by_hand = (
            f"{row_counts[name] / pairs:.2f} ({row_counts[name]} rows)"
            if name in row_counts
            else ""
        )
        print(f"{name:12s}{count / (row * pairs):24.2f}{by_hand:>28s}")
    print("XLA counts a loop body once, not once per iteration: for dropless, use the count by")
    print(f"hand, from the {in_rows // block} blocks in use.\n")

    calls = {name: partial(compiled, *arguments) for name, (compiled, arguments) in cases.items()}
    # ragged_dot is timed separately: its masked copies evict the memory of the others.
    alone = {"ragged_dot": calls.pop("ragged_dot")}
    times = timing.take_turns(calls, sizes.repeats) | timing.take_turns(alone, sizes.repeats)
    for name, measured in times.items():
        rate = row * pairs / np.median(measured[:, 0]) / 1e9
        print(f"{name:12s}{timing.describe(measured)}, {rate:.0f} useful GFLOP/s")
    claims = [
        timing.compare(times, name, "dense MLP", claim=f"MoE layer, {name}", target=target)
        for name, target in TARGETS.items()
    ]
    timing.report("moe_layer", claims)


if __name__ == "__main__":
    main()
