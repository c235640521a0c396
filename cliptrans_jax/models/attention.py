"""A decoder's attention: over its own tokens, with or without a cache, and over encoder states."""

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from common_jax.nn import dense
from common_jax.nn.attention import INIT
from common_jax.nn.attention import attend as dot_product_attention

Heads = Float[Array, "B T H K"]
# Cached keys and values are (B, H, S, K), so that a step reads them in memory order.
Memory = tuple[Float[Array, "B H S K"], Float[Array, "B H S K"]]


class DecoderAttention(nn.Module):
    """`common_jax.nn.attention.SelfAttention`, split up so that keys and values can be cached.

    Parameters: `qkv/kernel` (D, Q=3, H, K), `qkv/bias`, `out/kernel` (H, K, D), `out/bias`.
    """

    width: int
    heads: int
    dtype: DTypeLike
    attention: str = "auto"

    def setup(self):
        self.qkv = _split(self, 3)
        self.out = _join(self)

    def project(self, x: Float[Array, "B T D"]) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values."""
        qkv = self.qkv(x)
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    def __call__(
        self, x: Float[Array, "B T D"], visible: Bool[Array, "#B 1 T T"]
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """The output, and the keys and values to cache."""
        query, key, value = self.project(x)
        heads = dot_product_attention(query, key, value, visible, attention=self.attention)
        return self.out(heads), (key.swapaxes(1, 2), value.swapaxes(1, 2))

    def extend(
        self,
        x: Float[Array, "B T D"],
        memory: Memory,
        slot: jax.Array,
        visible: Bool[Array, "B 1 T S"],
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """`__call__` for T more tokens, whose keys and values are first written to `memory` from
        `slot` on."""
        query, *new = self.project(x)
        # There must be room for T tokens: XLA moves an update that does not fit to an earlier slot,
        # where it would silently overwrite others.
        memory = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, part.swapaxes(1, 2), slot, axis=2)
            for old, part in zip(memory, new, strict=True)
        )
        return self.out(attend(query, memory, visible)), memory


class CrossAttention(nn.Module):
    """Attention of decoder tokens over encoder states, whose keys and values are computed once.

    Parameters: `query/kernel` (D, H, K), `memory/kernel` (D, 2, H, K) for keys and values,
      `out/kernel` (H, K, D), and biases.
    """

    width: int
    heads: int
    dtype: DTypeLike
    attention: str = "auto"

    def setup(self):
        self.query = _layer(self, (self.heads, self.width // self.heads))
        self.memory = _split(self, 2)
        self.out = _join(self)

    def remember(self, states: Float[Array, "B S D"]) -> Memory:
        """Keys and values of encoder states."""
        pairs = self.memory(states)
        return pairs[:, :, 0].swapaxes(1, 2), pairs[:, :, 1].swapaxes(1, 2)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        states: Float[Array, "B S D"],
        visible: Bool[Array, "B 1 1 S"],
    ) -> Float[Array, "B T D"]:
        pairs = self.memory(states)
        heads = dot_product_attention(
            self.query(x), pairs[:, :, 0], pairs[:, :, 1], visible, attention=self.attention
        )
        return self.out(heads)

    def recall(
        self, x: Float[Array, "B T D"], memory: Memory, visible: Bool[Array, "B 1 1 S"]
    ) -> Float[Array, "B T D"]:
        """`__call__` with the keys and values of `remember`."""
        return self.out(attend(self.query(x), memory, visible))


def attend(
    query: Float[Array, "B T H K"], memory: Memory, visible: Bool[Array, "B 1 #T S"]
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v over cached keys and values, softmax in float32 at least."""
    keys, values = memory
    # On CPUs, the order of a product's axes can make it up to seven times slower. In the first
    # product slots are the rows, as there are many slots and few tokens. Its result is transposed
    # for the second only after the mask: right away, XLA would fuse the transpose into the product,
    # which is slow.
    kind = jnp.promote_types(query.dtype, jnp.float32)
    query = query.swapaxes(1, 2) * query.shape[-1] ** -0.5
    scores = jnp.einsum("BHSK,BHTK->BHST", keys, query, preferred_element_type=kind)
    # The lowest number, as in the original: with -inf, a row without visible slots would be NaN.
    scores = jnp.where(visible.swapaxes(2, 3), scores, jnp.finfo(kind).min)
    weights = jax.nn.softmax(scores.swapaxes(2, 3), axis=-1).astype(values.dtype)
    return jnp.einsum("BHTS,BHSK->BHTK", weights, values).swapaxes(1, 2)


def _split(module: DecoderAttention | CrossAttention, parts: int) -> nn.DenseGeneral:
    return _layer(module, (parts, module.heads, module.width // module.heads))


def _join(module: DecoderAttention | CrossAttention) -> nn.DenseGeneral:
    return _layer(module, module.width, axis=(-2, -1))


def _layer(
    module: DecoderAttention | CrossAttention,
    shape: int | tuple[int, ...],
    axis: int | tuple[int, ...] = -1,
) -> nn.DenseGeneral:
    return nn.DenseGeneral(
        shape, axis, kernel_init=INIT, dtype=module.dtype, dot_general=dense.product
    )
