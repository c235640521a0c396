"""Pooling of a ViT's tokens to the features that its head classifies."""

import types
from collections.abc import Callable, Mapping

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.nn import dense
from common_jax.nn.mlp import INIT, Mlp

Pool = Callable[[Float[Array, "B T D"], Float[Array, "B S D"]], Float[Array, "B _"]]

ATTENTION = "attention"

# Functions of all tokens, of which the first is the class token if there is one, and of patches.
POOLS: Mapping[str, Pool] = types.MappingProxyType(
    {
        "class": lambda tokens, patches: tokens[:, 0],
        "mean": lambda tokens, patches: patches.mean(axis=1),
        # DINOv2's linear classifier.
        "class_and_mean": lambda tokens, patches: jnp.concatenate(
            [tokens[:, 0], patches.mean(axis=1)], axis=-1
        ),
    }
)


class AttentionPool(nn.Module):
    """y + mlp(norm(y)), where y is the attention output of one learned query, the probe (SigLIP's
    head).

    Parameters: `probe` (1, 1, D), `attention` (see `ProbeAttention`), `norm`, `mlp`.
    """

    heads: int
    hidden: int
    activation: Callable[[jax.Array], jax.Array]
    norm_eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        width = tokens.shape[-1]
        probe = self.param("probe", nn.initializers.normal(width**-0.5), (1, 1, width))
        y = ProbeAttention(self.heads, self.dtype, name="attention")(jnp.asarray(probe), tokens)
        norm = nn.LayerNorm(self.norm_eps, use_fast_variance=False, dtype=self.dtype, name="norm")
        y = y + Mlp(self.hidden, self.dtype, self.activation, name="mlp")(norm(y))
        return y[:, 0]


class ProbeAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v with q from the probe, k and v from the tokens; heads concatenated
    and projected.

    Parameters: `query/kernel` (D, H, K), `key_value/kernel` (D, 2, H, K), `out/kernel` (H, K, D),
      each with a bias, even if the blocks' projections have none.
    """

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, probe: Float[Array, "1 1 D"], tokens: Float[Array, "B S D"]
    ) -> Float[Array, "B 1 D"]:
        width = tokens.shape[-1]
        heads = (self.heads, width // self.heads)
        query = self._project(heads, "query")(probe)
        key_value = self._project((2, *heads), "key_value")(tokens)
        key, value = key_value[:, :, 0], key_value[:, :, 1]
        # The probe is the same for all examples, so it is projected once.
        query = jnp.broadcast_to(query, (tokens.shape[0], *query.shape[1:]))
        attended = jax.nn.dot_product_attention(query, key, value)
        return self._project(width, "out", axis=(-2, -1))(attended)

    def _project(
        self, features: int | tuple[int, ...], name: str, axis: int | tuple[int, ...] = -1
    ) -> nn.DenseGeneral:
        return nn.DenseGeneral(
            features,
            axis=axis,
            kernel_init=INIT,
            dtype=self.dtype,
            dot_general=dense.product,
            name=name,
        )
