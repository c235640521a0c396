"""Pooling of the output latents' states into logits."""

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from m2mkd_jax.nac.layers import Linear, can_draw, draw

POOLINGS = ("gumbel", "gumbel_hard", "softmax", "first_slot")


class ConfidencePooling(nn.Module):
    """W sum_t w_t x_t + b,  w = softmax((confidence(x_t) + g_t) / temperature) over the latents
    (NAC, OutputLatentPooling).

    Confidences, weights and logits are in float32. In evaluation the noise (stream "pooling") is
    left out if the collection "noise" has no numbers and the stream has no key.

    Parameters: `confidence` (a linear layer to one number) and `head`.

    Attributes:
      labels: L.
      kind: "gumbel" adds Gumbel noise g, also in evaluation; "gumbel_hard" then takes the single
        best latent, with the gradient of the soft weights; "softmax" has no noise.
      temperature: temperature of the softmax.
    """

    labels: int
    kind: str
    temperature: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, states: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B L"]:
        precise = jnp.promote_types(self.dtype, jnp.float32)
        confidence = Linear(1, precise, name="confidence")(states)[..., 0]
        if self.kind != "softmax" and (train or can_draw(self, "gumbel", stream="pooling")):
            sample = lambda key: jax.random.gumbel(key, confidence.shape)  # noqa: E731
            confidence = confidence + draw(self, "gumbel", sample, stream="pooling")
        weights = jax.nn.softmax(confidence / self.temperature)
        if self.kind == "gumbel_hard":
            # Straight-through: the value of the one-hot choice, the gradient of the weights.
            best = jax.nn.one_hot(jnp.argmax(weights, axis=-1), weights.shape[-1])
            weights = jax.lax.stop_gradient(best - weights) + weights
        pooled = jnp.einsum("BT,BTD->BD", weights.astype(states.dtype), states)
        return Linear(self.labels, precise, name="head")(pooled)
