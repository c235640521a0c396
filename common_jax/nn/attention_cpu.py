"""Attention on CPU, with a custom backward pass.

From jax's own derivative, XLA's CPU compiler writes T x S arrays more often than necessary: it
normalises the attention weights, broadcasts the normalisers to T x S, and copies the scores'
gradient transposed. Here the normalisers divide the output and its incoming gradient, which are
smaller, and no product needs a transposed copy.
"""

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float


def fits(dtype: DTypeLike) -> bool:
    """True if sums can be accumulated in this dtype itself, as the CPU implementations assume."""
    return dtype in (jnp.float32, jnp.float64)


def attend(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S H K"],
    values: Float[Array, "B S H K"],
    visible: Bool[Array, "#B 1 #T S"] | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v.

    Args:
      query, keys, values: for all heads.
      visible: True for the keys (last axis) that each query attends to; None: all of them.
    """
    heads = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, keys, values))
    return _attend(*heads, visible).swapaxes(1, 2)


@jax.custom_vjp
def _attend(
    query: Float[Array, "B H T K"],
    keys: Float[Array, "B H S K"],
    values: Float[Array, "B H S K"],
    visible: Bool[Array, "#B 1 #T S"] | None,
) -> Float[Array, "B H T K"]:
    """softmax(q k^T) v."""
    return _forward(query, keys, values, visible)[0]


def _forward(query, keys, values, visible):
    """The result, and the residuals for the backward pass."""
    scores = jnp.einsum("BHTK,BHSK->BHTS", query, keys)
    if visible is not None:
        scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    result = jnp.einsum("BHTS,BHSK->BHTK", weights, values) / total
    return result, (query, keys, values, visible, weights, total, result)


def _backward(kept, dy):
    query, keys, values, visible, weights, total, result = kept
    # With w = weights / total, the scores' gradient is w (dy v^T - sum_K dy result).
    dy = dy / total
    mean = jnp.sum(dy * result, axis=-1, keepdims=True)
    by_scores = weights * (jnp.einsum("BHTK,BHSK->BHTS", dy, values) - mean)
    if visible is not None:  # even a query that attends to no key has non-zero weights
        by_scores = jnp.where(visible, by_scores, 0)
    by_query = jnp.einsum("BHTS,BHSK->BHTK", by_scores, keys)
    by_keys = jnp.einsum("BHTS,BHTK->BHSK", by_scores, query)
    by_values = jnp.einsum("BHTS,BHTK->BHSK", weights, dy)
    return by_query, by_keys, by_values, None


_attend.defvjp(_forward, _backward)
