"""Top-1 and top-5 accuracy and cross entropy, over real examples only."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from common_jax.ranking import rank_of


def restrict_logits(
    logits: Float[Array, "B L"], classes: tuple[int, ...]
) -> Float[Array, "B chosen"]:
    """The logits of some classes, column i that of `classes[i]`; softmax and ranks are then among
    these alone."""
    return logits[:, jnp.asarray(classes)]


def classification_sums(
    logits: Float[Array, "B L"], labels: Int[Array, "B"], mask: Float[Array, "B"]
) -> dict[str, Float[Array, ""]]:
    """Totals over a batch of: hits of the best label, hits among the best five, cross entropy.

    A hit is a rank (`rank_of`) below 1 or 5: equal logits rank by their index, as in `argmax` and
    `top_k`, so equal logits everywhere are a hit for label 0 alone; a logit of the true class that
    is not finite is never a hit, nor is one below a NaN. The cross entropy of such an example is
    not finite either, and neither is the total.

    Args:
      logits: of a model, in float32 at least; bfloat16 would make ties.
      labels: true classes.
      mask: 1 for an example, 0 for padding.
    """
    rank = rank_of(logits, labels)
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return {
        "accuracy": jnp.sum(mask * (rank < 1)),
        "accuracy_top5": jnp.sum(mask * (rank < 5)),
        "loss": jnp.sum(jnp.where(mask > 0, mask * loss, 0)),
    }
