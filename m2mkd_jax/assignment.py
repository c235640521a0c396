"""Minimum-cost assignment of rows to blocks of equal size, on the device."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int


def assign_blocks(cost: Float[Array, "*B T blocks"]) -> Int[Array, "*B T"]:
    """The block of each row: each block gets T / blocks rows, and the total cost is minimal.

    Exact up to rounding, like a linear assignment to T / blocks copies of every block. It is faster
    because it does not tell the copies apart: for 256 and 768 rows and 8 blocks it takes 6 and 11
    ms on two cores, where `optax.assignment.hungarian_algorithm` takes 59 and 897. There is no
    gradient.
    """
    flat = jax.lax.stop_gradient(cost).reshape(-1, *cost.shape[-2:])
    return jax.vmap(_assign)(flat).reshape(cost.shape[:-1])


def _assign(cost: jax.Array) -> jax.Array:
    """Successive shortest paths: every row starts in its cheapest block. Then, one row at a time, a
    crowded block is relieved by the cheapest chain of moves that ends in a block with room."""
    rows, blocks = cost.shape
    room = rows // blocks
    # Without a tolerance, rounding could make a chain of moves cyclic.
    tolerance = blocks * jnp.finfo(cost.dtype).eps * jnp.max(jnp.abs(cost))

    def sizes(labels):
        return jnp.sum(labels[:, None] == jnp.arange(blocks), axis=0)

    def crowded(state):
        moved, labels = state
        # One chain per row is always enough; the bound only matters for NaN costs, which would
        # otherwise loop forever.
        return (moved < rows) & jnp.any(sizes(labels) > room)

    def relieve(state):
        moved, labels = state
        # (rows, from, to): what moving a row from its block costs; infinite from other blocks.
        extra = cost - jnp.take_along_axis(cost, labels[:, None], axis=1)
        member = labels[:, None] == jnp.arange(blocks)
        extra = jnp.where(member[:, :, None], extra[:, None, :], jnp.inf)
        mover = jnp.argmin(extra, axis=0)  # (from, to): the row of `from` that moves most cheaply
        price = jnp.min(extra, axis=0)
        size = sizes(labels)

        # Bellman-Ford over the blocks. Dijkstra's algorithm needs prices of at least 0, but taking
        # back an earlier move saves cost. A shortest chain has at most blocks - 1 moves.
        def lengthen(_, paths):
            length, before = paths
            longer = length[:, None] + price
            origin, best = jnp.argmin(longer, axis=0), jnp.min(longer, axis=0)
            better = best < length - tolerance
            return jnp.where(better, best, length), jnp.where(better, origin, before)

        start = jnp.where(size > room, 0.0, jnp.inf).astype(cost.dtype), jnp.full(blocks, -1)
        length, before = jax.lax.fori_loop(0, blocks - 1, lengthen, start)

        # Predecessors lead from the chain's end back to the crowded block at its start. No block
        # occurs twice, so all movers are still in the blocks that they were found in.
        def step_back(_, walk):
            here, labels = walk
            origin = before[here]
            row = jnp.where(origin < 0, rows, mover[origin, here])  # `rows` is out of bounds: none
            labels = labels.at[row].set(here, mode="drop")
            return jnp.where(origin < 0, here, origin), labels

        end = jnp.argmin(jnp.where(size < room, length, jnp.inf))
        _, labels = jax.lax.fori_loop(0, blocks - 1, step_back, (end, labels))
        return moved + 1, labels

    start = jnp.int32(0), jnp.argmin(cost, axis=1)
    return jax.lax.while_loop(crowded, relieve, start)[1]
