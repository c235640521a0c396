"""What is minimised: the label loss of translation, and the contrastive loss of a CLIP."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int


def label_loss(
    logits: Float[Array, "B T V"],
    labels: Int[Array, "B T"],
    *,
    pad: int,
    smoothing: float = 0.0,
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
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    losses = log_z - (1 - smoothing) * chosen
    if smoothing:
        losses = losses - smoothing * jnp.mean(logits, axis=-1)
    return jnp.sum(weights * losses), jnp.sum(weights)


def contrastive_loss(
    texts: Float[Array, "B M"], images: Float[Array, "B M"], log_scale: Float[Array, ""]
) -> Float[Array, ""]:
    """CLIP loss (Radford et al. 2021, figure 3):  1/(2B) sum_b (-log p_bb - log q_bb).

    p and q are the softmax over rows and columns of exp(log_scale) x_b . y_c, where x and y are
    texts and images of unit length.
    """
    texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
    images = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
    scores = jnp.exp(log_scale) * (texts @ images.T)
    rows, columns = jax.nn.log_softmax(scores, axis=1), jax.nn.log_softmax(scores, axis=0)
    return -(jnp.mean(jnp.diag(rows)) + jnp.mean(jnp.diag(columns))) / 2
