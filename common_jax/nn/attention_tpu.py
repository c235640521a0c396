"""Attention on TPUs by JAX's splash kernel, which keeps no array of all weights."""

import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from common_jax.mesh import BATCH, batch_shards

# Sizes of the blocks of queries and of keys. A core's memory holds the scores of 768 x 768.
BLOCKS = (768, 640, 512, 384)


def splash(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S H K"],
    values: Float[Array, "B S H K"],
    *,
    visible: Bool[Array, "#B 1 1 S"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v, on each device of the mesh for its own examples; on each for all
    examples if these cannot be split evenly.

    Args:
      query, keys, values: of all heads.
      visible: the keys that all queries of an example attend to, at least one; None: all of them.
      interpret: computes the same without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import

    batch, queries, heads, width = query.shape
    senders = keys.shape[1]
    of_query, of_keys = _block(queries), _block(senders)
    query, keys, values = (
        _pad(x, axis=1, block=block).swapaxes(1, 2)
        for x, block in ((query * width**-0.5, of_query), (keys, of_keys), (values, of_keys))
    )
    # A query attends to the keys of its segment: 1. Queries that fill up the last block are in it
    # too, and are cut off below; keys that do so are not.
    seen = jnp.ones((1, senders), bool) if visible is None else visible[:, 0, 0]
    seen = jnp.broadcast_to(_pad(seen, axis=1, block=of_keys), (batch, keys.shape[2]))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask(
            [splash_attention.FullMask((query.shape[2], keys.shape[2]))] * heads
        ),
        block_sizes=splash_attention.BlockSizes(
            block_q=of_query,
            block_kv=of_keys,
            block_q_dkv=of_query,
            block_kv_dkv=of_keys,
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
    )

    def of_one(query, keys, values, seen):
        segments = jnp.ones(query.shape[1], jnp.int32), seen.astype(jnp.int32)
        return kernel(query, keys, values, segment_ids=splash_attention.SegmentIds(*segments))

    run = jax.vmap(of_one)
    if batch_shards() > 1:
        split = BATCH if batch % batch_shards() == 0 else PartitionSpec()
        # XLA cannot split a kernel. check_vma would ask for the kernel's results to say on which
        # axes they vary.
        run = jax.shard_map(run, in_specs=split, out_specs=split, check_vma=False)
    return run(query, keys, values, seen).swapaxes(1, 2)[:, :queries]


def _block(length: int) -> int:
    """The block that needs least padding of a length; of several, the largest."""
    return min(BLOCKS, key=lambda block: (-(-length // block) * block, -block))


def _pad(x: jax.Array, *, axis: int, block: int) -> jax.Array:
    """`x` with zeros up to a multiple of `block`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)
