"""Top-1 and top-5 accuracy and cross entropy, over real examples only."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int


def restrict_logits(
    logits: Float[Array, "B L"], classes: tuple[int, ...]
) -> Float[Array, "B chosen"]:
    """The logits of some classes, column i that of `classes[i]`; softmax and ranks are then among
    these alone."""
    return logits[:, jnp.asarray(classes)]


def classification_sums(
    logits: Float[Array, "B L"], labels: Int[Array, "B"], mask: Float[Array, "B"]
) -> dict[str, Float[Array, ""]]:
    """Totals over a batch of: hits of the best label, hits among the best five, cross entropy,
    examples.

    Args:
      logits: of a model.
      labels: true classes.
      mask: 1 for an example, 0 for padding.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    rank = jnp.sum(logits > own, axis=-1)
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return {
        "accuracy": jnp.sum(mask * (rank < 1)),
        "accuracy_top5": jnp.sum(mask * (rank < 5)),
        "loss": jnp.sum(mask * loss),
        "count": jnp.sum(mask),
    }
