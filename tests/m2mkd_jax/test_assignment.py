"""Rows assigned to blocks, by hand and where only chains of moves help; test_regularizers.py
compares with scipy."""

import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from m2mkd_jax import assignment

assign_blocks = jax.jit(assignment.assign_blocks)


def lowest_cost(cost):
    """The minimum cost over all ways of giving each block equally many rows."""
    rows, blocks = cost.shape
    labels = np.repeat(np.arange(blocks), rows // blocks)
    ways = set(itertools.permutations(labels.tolist()))
    return min(cost[np.arange(rows), list(way)].sum() for way in ways)


def test_full_block_gives_up_its_cheapest_rows():
    # All prefer block 0, which has room for two; rows 1 and 3 lose least elsewhere.
    cost = jnp.asarray([[0.0, 5.0], [0.0, 1.0], [0.0, 4.0], [0.0, 2.0]])
    np.testing.assert_array_equal(assign_blocks(cost), [0, 1, 0, 1])


@pytest.mark.parametrize("blocks", [3, 9])
def test_chain_of_moves_through_all_blocks(blocks):
    """Row i is in block i, except the last block, which is empty. One more row wants only block 0,
    so every row must move on by one."""
    cost = np.full((blocks, blocks), 100.0)
    cost[0, 0] = 0.0
    for row in range(1, blocks):
        cost[row, row - 1], cost[row, row] = 0.0, 1.0
    order = np.random.default_rng(blocks).permutation(blocks)
    np.testing.assert_array_equal(assign_blocks(jnp.asarray(cost[order], jnp.float32)), order)


def test_assignment_matches_brute_force():
    rng = np.random.default_rng(0)
    for shape in ((6, 3), (5, 5)):
        # Integers, some of them negative and many of them equal.
        costs = rng.integers(-3, 3, (20, *shape)).astype(np.float32)
        for cost, labels in zip(costs, np.asarray(assign_blocks(jnp.asarray(costs))), strict=True):
            np.testing.assert_array_equal(np.bincount(labels), shape[0] // shape[1])
            assert cost[np.arange(shape[0]), labels].sum() == lowest_cost(cost)


def test_batched_matrices_are_assigned_independently():
    costs = np.random.default_rng(1).normal(size=(4, 5, 6, 3)).astype(np.float32)
    found = np.asarray(assign_blocks(jnp.asarray(costs)))
    assert found.shape == (4, 5, 6)
    for place in np.ndindex(4, 5):
        chosen = costs[place][np.arange(6), found[place]]
        assert chosen.sum() == pytest.approx(lowest_cost(costs[place]), abs=1e-5)


def test_assignment_has_no_gradient():
    def total(cost):
        return jnp.sum(cost * assign_blocks(cost)[:, None])

    cost = jnp.asarray([[0.0, 5.0], [0.0, 1.0], [0.0, 4.0], [0.0, 2.0]])
    gradient = jax.grad(total)(cost)
    np.testing.assert_array_equal(gradient, [[0, 0], [1, 1], [0, 0], [1, 1]])
