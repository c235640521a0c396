"""The label loss of translation."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from cliptrans_jax.models.chunks import CHUNK, counts
from cliptrans_jax.models.linear_loss import linear_loss
from cliptrans_jax.translators.translator import Readout


def label_loss(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], *, pad: int, smoothing: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """CLIPTrans loss:  sum_bt w_bt ((1 - e) (-log p_bt,label) + e/V sum_v (-log p_btv)).

    p = softmax(logits) in float32; w = 1 if the label is neither negative nor a pad, else 0; e =
    smoothing, 0 in the original.

    Returns:
      The sum, and sum_bt w_bt; the original's loss is the former divided by the latter.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    weights = counts(labels, pad=pad).astype(logits.dtype)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # Ignored labels may be negative; any valid index will do, since their weight is 0.
    label_logits = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    losses = log_z - (1 - smoothing) * label_logits
    if smoothing:  # known when tracing: without it, the mean over V is not computed
        losses = losses - smoothing * jnp.mean(logits, axis=-1)
    return jnp.sum(weights * losses), jnp.sum(weights)


def states_loss(
    readout: Readout,
    states: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    pad: int,
    smoothing: float = 0.0,
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`label_loss` of the logits of `states`, which are never all in memory at once; see
    `models.linear_loss`.

    Args:
      readout: matrix and bias; the product is computed in the dtype of the states.
      chunk: memory budget, as the number of labels per device whose float32 logits would fill it.
    """
    kind = jnp.promote_types(states.dtype, jnp.float32)
    # A constant, so `linear_loss` computes no gradient for it.
    bias = jnp.zeros(len(readout.matrix)) if readout.bias is None else readout.bias
    # Numerators of p have the dtype of the states, so in bfloat16 twice as many rows fit.
    rows = max(1, chunk * jnp.dtype(jnp.float32).itemsize // states.dtype.itemsize)
    total = linear_loss(
        readout.matrix, bias, states, labels, pad=pad, smoothing=smoothing, chunk=rows
    )
    return total, jnp.sum(counts(labels, pad=pad), dtype=kind)
