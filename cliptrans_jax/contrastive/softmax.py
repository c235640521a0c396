"""The contrastive loss of CLIP (Radford et al. 2021, arXiv 2103.00020)."""

import math

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

from cliptrans_jax.contrastive.objective import Contrastive, Learned, Numbers, unit


def softmax_loss(
    texts: Float[Array, "B M"], images: Float[Array, "B M"], *, log_scale: Float[Array, ""]
) -> Float[Array, ""]:
    """CLIP loss (figure 3):  1/(2B) sum_b (-log p_bb - log q_bb).

    p and q are the softmax over rows and columns of exp(log_scale) x_b . y_c, where x and y are
    text and image features of unit length.
    """
    # [B, B] over the global batch, so every device needs all features of one side.
    scores = jnp.exp(log_scale) * (unit(texts) @ unit(images).T)
    rows, columns = jax.nn.log_softmax(scores, axis=1), jax.nn.log_softmax(scores, axis=0)
    return -(jnp.mean(jnp.diag(rows)) + jnp.mean(jnp.diag(columns))) / 2


def _metrics(learned: Numbers) -> Numbers:
    return {"scale": jnp.exp(learned["log_scale"])}


SOFTMAX = Contrastive(
    loss=softmax_loss,
    # Above 100, CLIP found training to be unstable (section 2.5).
    learned={"log_scale": Learned(most=math.log(100))},
    metrics=_metrics,
    smallest=2,  # the softmax over a single pair is 1 whatever the features
)
