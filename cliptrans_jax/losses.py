"""The label loss of translation."""

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from cliptrans_jax.models.chunks import CHUNK, Readout, Scores, total_of_chunks
from common_jax.mesh import batch_shards


def label_loss(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], *, pad: int, smoothing: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """CLIPTrans loss:  sum_bt w_bt ((1 - e) (-log p_bt,label) + e/V sum_v (-log p_btv)).

    p = softmax(logits) in float32; w = 1 where the label is neither negative nor a pad, else 0;
    e = smoothing, 0 in the original.

    Returns:
      The sum, and sum_bt w_bt: the original's loss is the first over the second.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    weights = ((labels >= 0) & (labels != pad)).astype(logits.dtype)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    label_logits = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    losses = log_z - (1 - smoothing) * label_logits
    if smoothing:
        losses = losses - smoothing * jnp.mean(logits, axis=-1)
    return jnp.sum(weights * losses), jnp.sum(weights)


def states_loss(
    scores: Scores,
    readout: Readout,
    states: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    pad: int,
    smoothing: float = 0.0,
    dtype: DTypeLike = jnp.float32,
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`label_loss` of scores(readout, states), computed chunk by chunk.

    The logits of 8,192 labels over 250,054 tokens take 8 GB, and so does their gradient. See
    `models.chunks.total_of_chunks`.

    Args:
      scores: pure function.
      readout: its parameters.
      dtype: in which matrices of the readout are sent to the devices. Their gradients are summed in
        float32 at least.
      chunk: labels per device and chunk.
    """
    if labels.size <= chunk * batch_shards():
        return label_loss(scores(readout, states), labels, pad=pad, smoothing=smoothing)

    def loss(
        readout: Readout, states: Float[Array, "#B #T D"], labels: Int[Array, "#B #T"]
    ) -> Float[Array, ""]:
        logits = scores(readout, states)
        return label_loss(logits, labels, pad=pad, smoothing=smoothing)[0]

    total = total_of_chunks(loss, readout, states, labels, pad=pad, dtype=dtype, chunk=chunk)
    kind = jnp.promote_types(states.dtype, jnp.float32)
    return total, jnp.sum((labels >= 0) & (labels != pad), dtype=kind)
