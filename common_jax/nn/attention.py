"""Multi-head self-attention with one fused projection for queries, keys and values."""

import jax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from common_jax.nn import dense

INIT = nn.initializers.normal(0.02)


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v, heads concatenated and projected back to the width D of the
    input.

    Parameters: `qkv/kernel` (D, Q=3, H, K), `qkv/bias` (Q, H, K) if `qkv_bias`, `out/kernel` (H,
      K, D), `out/bias` (D). The softmax is computed in float32 or wider, for any `dtype`.
    """

    heads: int
    qkv_bias: bool
    dtype: DTypeLike
    init: nn.initializers.Initializer = INIT
    out_init: nn.initializers.Initializer = INIT

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], visible: Bool[Array, "#B 1 #T T"] | None = None
    ) -> Float[Array, "B T D"]:
        """`visible` says which tokens (last axis) each token attends to; None: all of them."""
        width = x.shape[-1]
        features = (3, self.heads, width // self.heads)
        qkv = nn.DenseGeneral(
            features,
            use_bias=self.qkv_bias,
            kernel_init=self.init,
            dtype=self.dtype,
            dot_general=dense.product,
            name="qkv",
        )(x)
        query, key, value = (qkv[:, :, i] for i in range(3))
        heads = jax.nn.dot_product_attention(query, key, value, mask=visible)
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            kernel_init=self.out_init,
            dtype=self.dtype,
            dot_general=dense.product,
            name="out",
        )(heads)
