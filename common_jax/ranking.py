"""The rank of a score among others, for every metric that counts hits."""

from jax import numpy as jnp
from jaxtyping import Array, Float, Int


def rank_of(scores: Float[Array, "*B L"], own: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """The number of scores that rank before the one at index `own`; 0 for the best.

    Scores are ordered as by `argmax` and `top_k`: ties go to the lower index, and NaN comes before
    all numbers. So in a row of equal scores only index 0 is a hit. If the score at `own` is not
    finite, it ranks last: its rank is L, which no metric counts as a hit.
    """
    own_score = jnp.take_along_axis(scores, own[..., None], axis=-1)
    earlier = jnp.arange(scores.shape[-1]) < own[..., None]
    # "Not <=" instead of ">", so that NaN counts as larger.
    before = ~(scores <= own_score) | ((scores == own_score) & earlier)
    finite = jnp.isfinite(own_score[..., 0])
    return jnp.where(finite, jnp.sum(before, axis=-1), scores.shape[-1])
