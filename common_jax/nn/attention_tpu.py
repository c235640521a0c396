"""Attention on TPUs with JAX's splash kernel, which does not materialise the attention weights."""

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from common_jax.mesh import on_own_examples

# Block sizes for queries and for keys. A core's memory holds the scores of 768 x 768.
BLOCKS = (768, 640, 512, 384)
WIDEST_HEAD = 128


def fits(dtype: DTypeLike, width: int) -> bool:
    """True if the kernel supports arrays of this dtype, and heads of this width."""
    return dtype == jnp.bfloat16 and width % 8 == 0 and width <= WIDEST_HEAD


def splash(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S H K"],
    values: Float[Array, "B S H K"],
    *,
    visible: Bool[Array, "#B 1 1 S"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v. Each device of the mesh computes its own examples, or all
    examples if these do not split evenly.

    Args:
      query, keys, values: for all heads.
      visible: True for the keys that all queries of an example attend to, at least one; None: all.
      interpret: whether to compute the same without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import

    batch, queries, heads, width = query.shape
    senders = keys.shape[1]
    of_query, of_keys = _block(queries), _block(senders)
    query, keys, values = (
        _pad(x, block).swapaxes(1, 2)
        for x, block in ((query * width**-0.5, of_query), (keys, of_keys), (values, of_keys))
    )
    # A query attends to the keys in its own segment, which is 1 for all queries. Padding queries
    # are in it too, and are cut off below; padding keys are in segment 0.
    seen = jnp.ones((1, senders), bool) if visible is None else visible[:, 0, 0]
    seen = jnp.broadcast_to(_pad(seen, of_keys), (batch, keys.shape[2]))
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

    run = on_own_examples(jax.vmap(of_one))  # XLA cannot partition a kernel
    return run(query, keys, values, seen).swapaxes(1, 2)[:, :queries]


def _block(length: int) -> int:
    """The block size that pads a length least; ties go to the largest."""
    return min(BLOCKS, key=lambda block: (-(-length // block) * block, -block))


def _pad(x: Shaped[Array, "B T ..."], block: int) -> Shaped[Array, "B U ..."]:
    """Zero-pads `x` along its second axis to a multiple of `block`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)))
