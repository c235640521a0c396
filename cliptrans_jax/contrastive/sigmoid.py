"""The contrastive loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343)."""

import math

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

from cliptrans_jax.contrastive.objective import Contrastive, Learned, Numbers, unit


def sigmoid_loss(
    texts: Float[Array, "B M"],
    images: Float[Array, "B M"],
    *,
    log_scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, ""]:
    """SigLIP loss (algorithm 1):  -1/B sum_bc log sigmoid(z_bc (exp(log_scale) x_b . y_c + bias)).

    z_bc = 1 if b = c, else -1; x and y are text and image features of unit length. Each combination
    of text and image has its own term: there is no softmax over the batch.
    """
    # [B, B] over the global batch, so every device needs all features of one side.
    logits = jnp.exp(log_scale) * (unit(texts) @ unit(images).T) + bias
    signs = 2 * jnp.eye(len(texts), dtype=logits.dtype) - 1
    # Divided by B, not by the number of terms, B^2.
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(texts)


def _metrics(learned: Numbers) -> Numbers:
    return {"scale": jnp.exp(learned["log_scale"]), "bias": learned["bias"]}


# With t' = log 10 and b = -10 every pair starts out as a negative, as nearly all of them are.
SIGMOID = Contrastive(
    loss=sigmoid_loss,
    learned={"log_scale": Learned(start=math.log(10)), "bias": Learned(start=-10.0)},
    metrics=_metrics,
)
