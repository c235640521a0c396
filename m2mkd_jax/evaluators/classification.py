"""Top-1 and top-5 accuracy and cross entropy."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from common_jax.ranking import rank_of


def restrict_logits(
    logits: Float[Array, "B L"], classes: tuple[int, ...]
) -> Float[Array, "B chosen"]:
    """Logits with column i taken from class `classes[i]`, so that softmax and ranks are computed
    among these classes only."""
    return logits[:, jnp.asarray(classes)]


def classification_sums(
    logits: Float[Array, "B L"], labels: Int[Array, " B"], mask: Float[Array, " B"]
) -> dict[str, Float[Array, ""]]:
    """Top-1 hits, top-5 hits and cross entropy, summed over the examples whose `mask` is 1.

    A top-1 or top-5 hit is a rank (`rank_of`) below 1 or 5. Equal logits rank by index, as in
    `argmax` and `top_k`, so if all are equal, only label 0 is a top-1 hit. NaN ranks above all
    numbers, and a true-class logit that is not finite is never a hit; the cross entropy, and so its
    total, is then not finite either. `logits` are at least float32, since bfloat16 would cause
    ties.
    """
    rank = rank_of(logits, labels)
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return {
        "accuracy": jnp.sum(mask * (rank < 1)),
        "accuracy_top5": jnp.sum(mask * (rank < 5)),
        # Selected as well as multiplied: the loss of a padded row may be infinite, and 0 times that
        # is NaN.
        "loss": jnp.sum(jnp.where(mask > 0, mask * loss, 0)),
    }
