"""Pools tokens by attention with a learned query."""

from collections.abc import Callable

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.nn import dense
from common_jax.nn.mlp import INIT, Mlp
from common_jax.nn.norm import LayerNorm


class AttentionPool(nn.Module):
    """y + mlp(norm(y)), where y is the attention output for one learned query, the probe (SigLIP's
    head).

    Parameters: `probe` (1, 1, D), `attention` (see `ProbeAttention`), `norm`, `mlp`.
    """

    heads: int
    hidden: int
    activation: Callable[[jax.Array], jax.Array]
    norm_eps: float
    dtype: DTypeLike
    stacked: bool = False

    @nn.compact
    def __call__(self, tokens: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        width = tokens.shape[-1]
        probe = self.param("probe", nn.initializers.normal(width**-0.5), (1, 1, width))
        attention = ProbeAttention(self.heads, self.dtype, self.stacked, name="attention")
        y = attention(jnp.asarray(probe), tokens)
        norm = LayerNorm(self.norm_eps, self.dtype, name="norm")
        y = y + Mlp(self.hidden, self.dtype, self.activation, name="mlp")(norm(y))
        return y[:, 0]


class ProbeAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v with q from the probe, and k and v from the tokens; heads are
    concatenated and projected.

    Parameters: `query/kernel` (D, H, K), `key_value/kernel` (D, 2, H, K), `out/kernel` (H, K, D),
      each with a bias, even if the blocks' projections have none. If `stacked`, the first two are
      a single `qkv/kernel` (D, Q=3, H, K), as in torch.nn.MultiheadAttention.
    """

    heads: int
    dtype: DTypeLike
    stacked: bool = False

    @nn.compact
    def __call__(
        self, probe: Float[Array, "1 1 D"], tokens: Float[Array, "B S D"]
    ) -> Float[Array, "B 1 D"]:
        width = tokens.shape[-1]
        heads = (self.heads, width // self.heads)
        if self.stacked:
            query, key_value = StackedProjections(heads, self.dtype, name="qkv")(probe, tokens)
        else:
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


class StackedProjections(nn.Module):
    """The probe's query, and the tokens' keys and values, from one stacked kernel.

    Parameters: `kernel` (D, Q=3, H, K), `bias` (Q, H, K).
    """

    heads: tuple[int, int]
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, probe: Float[Array, "1 1 D"], tokens: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "1 1 H K"], Float[Array, "B S 2 H K"]]:
        width = tokens.shape[-1]
        kernel = self.param("kernel", INIT, (width, 3, *self.heads))
        bias = self.param("bias", nn.initializers.zeros, (3, *self.heads))
        probe, tokens, kernel, bias = nn.dtypes.promote_dtype(
            probe, tokens, kernel, bias, dtype=self.dtype
        )
        last = (((2,), (0,)), ((), ()))
        query = dense.product(probe, kernel[:, 0], last) + bias[0]
        return query, dense.product(tokens, kernel[:, 1:], last) + bias[1:]
