"""The k largest of long rows, without sorting them on GPUs or gathering them on every device."""

import functools

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from common_jax.mesh import on_own_examples

LONG_SORT = 16  # for a larger k, XLA for GPUs finds the top k by sorting whole rows
SPAN = 512  # neighbouring entries that `top_k` then first reduces to their maximum


def top_k(
    x: Float[Array, "B ..."], count: int
) -> tuple[Float[Array, "B ..."], Int[Array, "B ..."]]:
    """The k largest along the last axis and their indices, computed by each device for its
    examples.

    Left to itself, XLA would gather the scores of all examples on every device.
    """
    few = count <= LONG_SORT or x.shape[-1] <= count * SPAN
    choose = functools.partial(jax.lax.top_k if few else _top_k_of_spans, k=count)
    best, place = on_own_examples(choose)(x)
    return best, place


def _top_k_of_spans(
    x: Float[Array, "... V"], k: int
) -> tuple[Float[Array, "... {k}"], Int[Array, "... {k}"]]:
    """`jax.lax.top_k` without sorting whole rows; ties come in the same order.

    The k largest are in the k spans with the largest maxima, earlier spans first among ties: each
    of these spans has an entry that beats all of any other span.
    """
    padded = jnp.pad(
        x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % SPAN)], constant_values=-jnp.inf
    )
    spans = padded.reshape(*x.shape[:-1], -1, SPAN)  # [..., spans, SPAN]
    _, chosen = jax.lax.top_k(jnp.max(spans, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # so that ties keep their order
    entries = jnp.take_along_axis(spans, chosen[..., None], axis=-2)  # [..., k, SPAN]
    best, place = jax.lax.top_k(entries.reshape(*x.shape[:-1], -1), k)
    span = jnp.take_along_axis(chosen, place // SPAN, axis=-1)
    return best, span * SPAN + place % SPAN
