"""Top-1 and top-5 accuracy and cross entropy."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from common_jax.ranking import rank_of


def restrict_logits(
    logits: Float[Array, "B L"], classes: tuple[int, ...]
) -> Float[Array, "B chosen"]:
    """Logits whose column i is that of `classes[i]`, so that softmax and ranks are among these
    classes alone."""
    return logits[:, jnp.asarray(classes)]


def classification_sums(
    logits: Float[Array, "B L"], labels: Int[Array, " B"], mask: Float[Array, " B"]
) -> dict[str, Float[Array, ""]]:
    """Top-1 hits, top-5 hits and cross entropy, summed over the examples whose `mask` is 1.

    A hit is a rank (`rank_of`) below 1 or 5: equal logits rank by index, as in `argmax` and
    `top_k`, so if all are equal only label 0 is a hit. A logit of the true class that is not finite
    is never a hit, nor is one below a NaN; cross entropy and total are then not finite either.
    `logits` are in float32 at least: bfloat16 would make ties.
    """
    rank = rank_of(logits, labels)
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return {
        "accuracy": jnp.sum(mask * (rank < 1)),
        "accuracy_top5": jnp.sum(mask * (rank < 5)),
        "loss": jnp.sum(jnp.where(mask > 0, mask * loss, 0)),
    }
