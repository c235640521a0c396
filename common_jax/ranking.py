"""The rank of a score among others, for every metric that counts hits."""

from jax import numpy as jnp
from jaxtyping import Array, Float, Int


def rank_of(scores: Float[Array, "*B L"], own: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """The number of scores that come before that of `own`; 0 for the best.

    The order is that of `argmax` and `top_k`: of equal scores the first comes first, and NaN comes
    before all numbers. So a row of equal scores is a hit for its first place alone. A score of
    `own` that is not finite comes last: its rank is L, which no metric counts as a hit.
    """
    own_score = jnp.take_along_axis(scores, own[..., None], axis=-1)
    earlier = jnp.arange(scores.shape[-1]) < own[..., None]
    # "Not less or equal", and not "greater", so that NaN counts as larger.
    before = ~(scores <= own_score) | ((scores == own_score) & earlier)
    finite = jnp.isfinite(own_score[..., 0])
    return jnp.where(finite, jnp.sum(before, axis=-1), scores.shape[-1])
