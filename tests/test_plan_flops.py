"""The FLOPs that a plan counts, against counts by hand."""

import dataclasses
import functools

import jax
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from meshes import one_device
from tiny import MOE, tiny_config

from common_jax.commands.plan.flops import Flops, UnknownLength, count_flops
from common_jax.commands.plan.steps import step_flops
from common_jax.mesh import MeshConfig, make_mesh
from m2mkd_jax.phases.pipeline import describe

FLOAT = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def training_of(config, mesh=None):
    return describe(config, mesh or one_device())


def test_product_flops_are_multiplied_by_loop_lengths():
    x, w = FLOAT((4, 8)), FLOAT((8, 8))

    def scanned(x, w):
        return lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    assert count_flops(scanned, x, w).model == 5 * 2 * 4 * 8 * 8
    image, kernel = FLOAT((2, 6, 6, 3)), FLOAT((3, 3, 3, 7))
    convolve = functools.partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    assert count_flops(convolve, image, kernel).model == 2 * (2 * 4 * 4 * 7) * (3 * 3 * 3)
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    assert count_flops(lax.ragged_dot, x, FLOAT((2, 8, 3)), sizes).model == 2 * 4 * 8 * 3


def test_unused_products_are_not_counted():
    @jax.jit
    def both(x):
        return x @ x, x @ x.T

    found = count_flops(lambda x: both(x)[0], jnp.ones((3, 3)))
    assert found == Flops(model=2 * 3 * 3 * 3)


def test_batched_products_and_grouped_convolutions_match_a_hand_count():
    product = functools.partial(jnp.einsum, "bij,bjk->bik")
    assert count_flops(product, FLOAT((5, 2, 3)), FLOAT((5, 3, 7))).model == 5 * 2 * 2 * 3 * 7
    several = functools.partial(jnp.einsum, "aibj,ajb->ai")
    assert count_flops(several, FLOAT((2, 3, 5, 7)), FLOAT((2, 7, 5))).model == 2 * 2 * 3 * 5 * 7
    grouped = functools.partial(
        lax.conv_general_dilated, window_strides=(2, 1), padding="VALID", feature_group_count=3,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    found = count_flops(grouped, FLOAT((2, 6, 4, 6)), FLOAT((2, 3, 2, 9)))
    # Outputs have 3 x 2 places and 9 channels, each from 2 x 3 places of 2 of the 6 channels.
    assert found == Flops(2 * (2 * 3 * 2 * 9) * (2 * 3 * 2), 0)


def test_ragged_products_count_all_rows():
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    x, w = FLOAT((4, 8)), FLOAT((2, 8, 3))

    def loss(x, w, sizes):
        return jnp.sum(lax.ragged_dot(x, w, sizes))

    # Forward, and backward with respect to rows and to weights: each 4 rows of 8 by 3.
    both = jax.value_and_grad(loss, (0, 1))
    assert count_flops(both, x, w, sizes).model == 3 * 2 * 4 * 8 * 3


def test_recomputation_is_counted_separately():
    x, w = FLOAT((4, 8)), FLOAT((8, 8))

    def loss(x, w):
        return jnp.sum(jnp.sin(jax.checkpoint(lambda x: jnp.sin(x @ w) @ w)(x)))

    once, twice = 2 * 4 * 8 * 8, 2 * 2 * 4 * 8 * 8
    # Forward two products, backward one for each with respect to x; the first is recomputed.
    assert count_flops(jax.grad(loss), x, w) == Flops(2 * twice, once)
    assert count_flops(jax.grad(loss), x, w).executed == 5 * once
    assert Flops(2, 3) + Flops(10, 20) == Flops(12, 23)
    assert Flops(2, 3) * 5 == Flops(10, 15)


def test_shard_map_flops_count_every_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    each = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    # Half of the 6 rows on each of 8 devices, four of which compute the same.
    assert count_flops(each, FLOAT((6, 4)), FLOAT((4, 5))).model == 8 * 2 * 3 * 4 * 5


def test_largest_branch_counts_and_open_loops_are_refused():
    x = FLOAT((4, 4))

    def chosen(x, n):
        return lax.switch(n, (lambda x: x, lambda x: x @ x, lambda x: x @ x @ x), x)

    def looped(x, n):
        return lax.fori_loop(0, n, lambda _, y: y @ x, x)

    number = jax.ShapeDtypeStruct((), jnp.int32)
    assert count_flops(chosen, x, number).model == 2 * 2 * 4**3
    with pytest.raises(UnknownLength, match="depends on its data"):
        count_flops(looped, x, number)
    either = lambda x, n: lax.cond(n > 0, lambda: looped(x, n), lambda: x @ x)  # noqa: E731
    assert count_flops(either, x, number).model == 2 * 4**3


@pytest.mark.parametrize("remat", [False, True])
def test_vit_flops_match_a_hand_count(remat):
    config = tiny_config("pretrain_meta")
    config = dataclasses.replace(config, meta=dataclasses.replace(config.meta, remat=remat))
    tokens, width, hidden, labels, batch, blocks = 5, 16, 32, 10, 64, 3
    projections = 2 * tokens * width * (3 * width + width)
    attention = 2 * 2 * tokens * tokens * width
    up = down = 2 * tokens * width * hidden
    block = projections + attention + up + down
    patches, head = 2 * 4 * (4 * 4) * width, 2 * width * labels
    # Backward, every product has two: for its input and for its weights. Images have no gradient.
    model = batch * (3 * blocks * block + 2 * patches + 3 * head)
    # A block is recomputed except for its last product, whose result is not needed.
    again = batch * blocks * (block - down) if remat else 0
    task = training_of(config).task(steps_per_epoch=10)
    assert step_flops(task, config.optim) == Flops(model, again)
    halved = dataclasses.replace(config.optim, batch=2 * batch, accumulate=2)
    assert step_flops(task, halved) == Flops(2 * model, 2 * again)


def test_expert_slots_count_and_frozen_networks_have_no_gradients():
    moe = dataclasses.replace(MOE, dispatch="capacity", capacity_factor=1.0, groups=8)
    config = tiny_config("distill", moe=moe)
    config = dataclasses.replace(config, module="1")
    tokens, width, hidden, batch = 5, 16, 32, 64
    mlp = 2 * 2 * tokens * width * hidden
    attention = 2 * tokens * width * 4 * width + 2 * 2 * tokens * tokens * width
    patches, head = 2 * 4 * (4 * 4) * width, 2 * width * 10
    # A group of 40 tokens has 20 slots for each of 4 experts: two per token, each an MLP.
    expert_block = attention + 2 * mlp + 2 * tokens * width * 4
    student = expert_block + 2 * (2 * tokens * width * width)  # between its two stitches
    dense = attention + mlp
    shared = patches + dense  # the meta model's first stage, without gradients
    behind = dense + head  # its last stage passes the student's gradient on to its input
    teacher = dense + behind
    expected = shared + teacher + 3 * student + 2 * behind
    # Attention has two products of activations only; frozen, each has a gradient for either factor.
    expected += 2 * 2 * tokens * tokens * width
    task = training_of(config).task(steps_per_epoch=10)
    assert step_flops(task, config.optim) == Flops(batch * expected, 0)
