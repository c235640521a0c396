"""A V-MoE block against one with the textbook mixture of experts, on the same weights.

The textbook layer is that of GShard and of V-MoE's own code: given one-hot masks [G, N, E, C] of
the tokens in each expert's slots, one einsum dispatches tokens to slots, and another combines the
weighted results. Router, priority and number of slots are those of our `capacity` layer, whose
outputs and gradients are compared with the textbook layer's first. `dropless` also computes the
tokens that these two drop. Block: norm, attention, norm, experts, with residuals; forward and
backward pass, gradients of input and parameters, float32. The layers are also timed alone.

google-research/vmoe is not on PyPI, so its layer is written out here.

    python benchmarks/vmoe_block.py
"""

import argparse
import dataclasses
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax import Array

from m2mkd_jax.models.encoder import Block, BlockConfig, EncoderConfig
from m2mkd_jax.moe import dispatch
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.moe.grouped import Experts
from m2mkd_jax.moe.layer import MoeMlp
from m2mkd_jax.moe.routers import Routes, rank_in_expert

TOLERANCE = 1e-4
NORM_EPS = 1e-6


def block_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the sizes of a block."""
    parser = timing.parser(doc)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=768, help="hidden width of an expert")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=197, help="tokens of an example")
    return parser


def make_block(sizes: argparse.Namespace, moe: MoeConfig) -> Block:
    """A V-MoE block in float32."""
    encoder = EncoderConfig(
        patch=16,
        width=sizes.width,
        heads=sizes.heads,
        hidden=sizes.hidden,
        qkv_bias=True,
        norm_eps=NORM_EPS,
    )
    return Block(encoder, BlockConfig(moe=moe), jnp.float32)


def parse_sizes() -> argparse.Namespace:
    parser = block_parser(__doc__)
    parser.add_argument("--chosen", type=int, default=2, help="experts per token")
    parser.add_argument("--capacity-factor", type=float, default=1.05, help="as V-MoE trains")
    parser.add_argument("--groups", type=int, default=4, help="routing groups of the batch")
    return parser.parse_args()


def textbook(x: Array, routes: Routes, experts: Experts, slots: int) -> tuple[Array, Array]:
    """`m2mkd_jax.moe.dispatch.capacity`, computed with masks."""
    count, groups = experts.up.shape[0], x.shape[0]
    rank, _ = jax.vmap(lambda expert: rank_in_expert(expert, count))(routes.expert)
    order = jnp.argsort(routes.token, axis=1, stable=True)

    def of_tokens(pairs: Array) -> Array:
        return jnp.take_along_axis(pairs, order, axis=1).reshape(groups, x.shape[1], -1)

    expert = jax.nn.one_hot(of_tokens(routes.expert), count)
    slot = jax.nn.one_hot(of_tokens(rank), slots)  # all zeros for ranks beyond the last slot
    send = jnp.einsum("GNAE,GNAC->GNEC", expert, slot)
    combine = jnp.einsum("GNA,GNAE,GNAC->GNEC", of_tokens(routes.weight), expert, slot)
    rows = jnp.einsum("GNEC,GND->EGCD", send, x)
    hidden = jnp.einsum("EGCD,EDF->EGCF", rows, experts.up) + experts.up_bias[:, None, None]
    hidden = jax.nn.gelu(hidden, approximate=False)
    answers = jnp.einsum("EGCF,EFD->EGCD", hidden, experts.down) + experts.down_bias[:, None, None]
    return jnp.einsum("GNEC,EGCD->GND", combine, answers), jnp.mean(rank >= slots)


def compile_case(apply: Callable, params: dict, x: Array, dispatcher: str) -> Callable[[], tuple]:
    """y, and the gradients of sum(y * dy) with respect to parameters and input."""
    dy = jax.random.normal(jax.random.key(9), x.shape)

    def run(params: dict, x: Array) -> tuple:
        y, vjp = jax.vjp(apply, params, x)
        return y, vjp(dy)

    table = dispatch.DISPATCHERS
    replaced = {"capacity": table["capacity"]._replace(run=textbook)}
    with mock.patch.dict(table, replaced if dispatcher == "textbook" else {}):
        compiled = jax.jit(run).lower(params, x).compile()
    return lambda: compiled(params, x)


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads, keep_memory=True)
    shared = {"experts": sizes.experts, "chosen": sizes.chosen, "expert_init": "fan_in"}
    capacity = MoeConfig(
        router="softmax_topk",
        noise_std=0.0,
        dispatch="capacity",
        capacity_factor=sizes.capacity_factor,
        groups=sizes.groups,
        **shared,
    )
    layers = {
        "textbook": capacity,
        "capacity": capacity,
        "dropless": dataclasses.replace(capacity, dispatch="dropless"),
    }
    shape = (sizes.examples, sizes.tokens, sizes.width)
    x = jax.random.normal(jax.random.key(0), shape)
    params = make_block(sizes, capacity).init(jax.random.key(1), x, True)["params"]

    def block(moe: MoeConfig) -> Callable:
        network = make_block(sizes, moe)
        return lambda params, x: network.apply({"params": params}, x, True)

    def layer(moe: MoeConfig) -> Callable:
        network = MoeMlp(moe, sizes.hidden)
        return lambda params, x: network.apply({"params": params}, x)

    blocks = {name: compile_case(block(moe), params, x, name) for name, moe in layers.items()}
    alone = {name: compile_case(layer(moe), params["moe"], x, name) for name, moe in layers.items()}
    for cases in (blocks, alone):
        timing.check_results(cases["capacity"](), cases["textbook"](), TOLERANCE)

    slots = capacity.slots(sizes.examples * sizes.tokens // sizes.groups)
    print(
        f"jax {jax.__version__}; {sizes.examples} x {sizes.tokens} tokens in {sizes.groups} groups,"
        f" {sizes.experts} experts, {sizes.chosen} per token, {slots} slots per expert and group"
    )
    cases = {f"{name} block": case for name, case in blocks.items()}
    cases |= {f"{name} layer": case for name, case in alone.items()}
    times = timing.take_turns(cases, sizes.repeats)
    claims = [
        timing.compare(
            times,
            f"{name} {part}",
            f"textbook {part}",
            claim=f"V-MoE {part}, {name}",
            target=1.0 if part == "block" else None,
        )
        for part in ("block", "layer")
        for name in ("capacity", "dropless")
    ]
    masks = 2 * np.prod((sizes.examples * sizes.tokens, sizes.experts, slots)) * 4 / 2**20
    timing.report("vmoe_block", claims, times=times, slots=slots, mask_mib=float(masks))


if __name__ == "__main__":
    main()
