"""The read-in: input latents attend to the tokens of an image.

Every receiver has keys and values of its own, since the tokens are scaled by factors from the
receiver's code before they are projected. Computed naively, that needs arrays of shape
(B, S, T, H K), 9.9 GB each for ImageNet at 32 images. The projection is linear, so the sums can be
rearranged such that none of these arrays is needed:

  score_bhts = <(W_h q_bth) * s_t, x_bs> / sqrt(K)        s = scales of the keys
  out_bth    = W'_h^T (s'_t * sum_s a_bhts x_bs) + b'_h    s' = scales of the values

with W_h (U, K) the kernel of head h. The bias of the keys adds the same number to the scores of all
tokens, which the softmax ignores; the bias of the values is added once, since the weights a sum to
1. The result is attention with H T queries of width U, whose keys and values are both the normed
tokens, shared by all heads.

Layers that are not linear in their input, or that scale their weights, cannot be rearranged: they
use the plain form, which needs those arrays.
"""

import math

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from m2mkd_jax.nac.blocks import BlockConfig, Ffn, layer_scale, scale_branch
from m2mkd_jax.nac.layers import CodeLinear, add_code_noise, norm


class ReadInAttention(nn.Module):
    """Attention from receivers to tokens, with keys and values conditioned on each receiver's code
    (NAC, ReadInAttention).

    Parameters: `receiver_norm`, `sender_norm`, `query`, `key`, `value`, `exit`, `layer_scale` (D).

    Attributes:
      config: config of the block.
      token_width: token width U.
      scale: initial value of the layer scale; None for no layer scale.
    """

    config: BlockConfig
    token_width: int
    scale: float | None
    dtype: DTypeLike

    def setup(self):
        config = self.config
        self.receiver_norm, self.sender_norm = norm(None, self.dtype), norm(None, self.dtype)
        inner, bias = config.inner, config.qkv_bias
        self.query = config.layer(self.dtype, config.width, inner, bias)
        self.key = config.layer(self.dtype, self.token_width, inner, bias)
        self.value = config.layer(self.dtype, self.token_width, inner, bias)
        self.exit = config.layer(self.dtype, inner, config.width, True)
        self.layer_scale = layer_scale(self, self.scale, config.width)

    def __call__(
        self,
        receivers: Float[Array, "B T D"],
        codes: Float[Array, "#T Z"],
        tokens: Float[Array, "B S U"],
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """Returns the receivers' new states."""
        config = self.config
        query = self.query(self.receiver_norm(receivers), codes, train=train)
        query = query.reshape(*query.shape[:-1], config.heads, config.head_width)
        tokens = self.sender_norm(tokens)
        # The rearrangement requires that a key is the kernel applied to the scaled token, with
        # nothing after it.
        if config.linear.is_linear and config.linear.kind != "weight_modulated":
            heads = pool_tokens(
                query,
                tokens,
                self.key.scales(codes, train=train),
                self.value.scales(codes, train=train),
                self._by_head(self.key),
                self._by_head(self.value),
            )
            pooled = heads.reshape(*heads.shape[:2], config.inner)
            # The weights of a receiver sum to 1, so the bias of its values can follow the pooling.
            # The bias of the keys changes no result, and is only there to hold published weights.
            if config.qkv_bias:
                pooled = pooled + self.value.bias.astype(self.dtype)
        else:
            pooled = self._pool_plainly(query, tokens, codes, train=train)
        branch = scale_branch(self.exit(pooled, codes, train=train), self.layer_scale)
        return receivers + branch if config.residual else branch

    def _pool_plainly(self, query, tokens, codes, *, train: bool) -> Float[Array, "B T _"]:
        """Attends with separate keys and values for every pair of token and receiver.

        Needs two arrays of shape (B, S, T, H K).
        """
        per_receiver = jnp.broadcast_to(
            tokens[:, :, None], (*tokens.shape[:2], query.shape[1], self.token_width)
        )
        # (B, S, T, H, K) each.
        keys, values = (
            layer(per_receiver, codes, train=train).reshape(
                *per_receiver.shape[:3], *query.shape[2:]
            )
            for layer in (self.key, self.value)
        )
        precise = jnp.promote_types(query.dtype, jnp.float32)
        scores = jnp.einsum("BTHK,BSTHK->BHTS", query, keys, preferred_element_type=precise)
        weights = jax.nn.softmax(scores / math.sqrt(query.shape[-1])).astype(values.dtype)
        heads = jnp.einsum("BHTS,BSTHK->BTHK", weights, values)
        return heads.reshape(*heads.shape[:2], self.config.inner)

    def _by_head(self, linear: CodeLinear) -> Float[Array, "U H K"]:
        # The head is the slower index of the output axis, as in `LatentAttention`.
        return linear.kernel.reshape(-1, self.config.heads, self.config.head_width)


class AttentiveReadIn(nn.Module):
    """Attention to the tokens, then an MLP, with noise on the codes (NAC, AttentiveReadIn).

    Parameters: `attention`, `ffn`.
    """

    config: BlockConfig
    token_width: int
    attention_scale: float | None
    dtype: DTypeLike

    def setup(self):
        self.attention = ReadInAttention(
            self.config, self.token_width, self.attention_scale, self.dtype
        )
        self.ffn = Ffn(self.config, self.dtype)

    def __call__(
        self,
        receivers: Float[Array, "B T D"],
        codes: Float[Array, "#T Z"],
        tokens: Float[Array, "B S U"],
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """Returns the input latents' states."""
        # One draw for both: a receiver has the same noisy code in attention and MLP.
        codes = add_code_noise(self, "receiver_codes", codes, self.config.code_noise, train=train)
        states = self.attention(receivers, codes, tokens, train=train)
        return self.ffn(states, codes, train=train)


class ProjectionReadIn(nn.Module):
    """Projects token i to the state of input latent i, conditioned on the latent's noisy code (NAC,
    ProjectionReadIn). There must be as many tokens as latents.

    Parameters: `projection`, `ffn`.
    """

    config: BlockConfig
    token_width: int
    dtype: DTypeLike

    def setup(self):
        config = self.config
        self.projection = CodeLinear(
            config.linear, self.token_width, config.width, config.code_width, True, self.dtype
        )
        self.ffn = Ffn(config, self.dtype)

    def __call__(
        self,
        receivers: Float[Array, "B T D"],
        codes: Float[Array, "T Z"],
        tokens: Float[Array, "B S U"],
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """Returns the input latents' states, which do not depend on `receivers`."""
        if tokens.shape[1] != codes.shape[0]:
            raise ValueError(
                f"config.model.read_in='projection' needs as many input latents as tokens, but "
                f"there are {codes.shape[0]} and {tokens.shape[1]}: set config.model.inputs to "
                f"{tokens.shape[1]}"
            )
        del receivers
        codes = add_code_noise(self, "receiver_codes", codes, self.config.code_noise, train=train)
        return self.ffn(self.projection(tokens, codes, train=train), codes, train=train)


def pool_tokens(
    query: Float[Array, "B T H K"],
    tokens: Float[Array, "B S U"],
    key_scales: Float[Array, "#T U"],
    value_scales: Float[Array, "#T U"],
    key_kernel: Float[Array, "U H K"],
    value_kernel: Float[Array, "U H K"],
) -> Float[Array, "B T H K"]:
    """Attends to tokens x with keys W (s_t * x) and values W' (s'_t * x) for each receiver t.

    Neither keys nor values are computed; see the module docstring for the rearrangement. The
    forward pass takes 4 B T H K U + 4 B H T S U floating point operations, versus 4 B S T U H K in
    the plain form.
    """
    dtype = query.dtype
    batch, receivers, heads, width = query.shape
    key_scales, value_scales = (s[:, None, :].astype(dtype) for s in (key_scales, value_scales))
    # Moves the key projection to the queries, and 1 / sqrt(K) with it, where it is cheapest.
    widened = jnp.einsum("BTHK,UHK->BTHU", query / math.sqrt(width), key_kernel.astype(dtype))
    # One batched product with the queries of all heads as rows, so that the second factor is the
    # tokens themselves and not a copy per head. Here T is receivers times heads.
    rows = (widened * key_scales).reshape(batch, receivers * heads, -1)
    precise = jnp.promote_types(dtype, jnp.float32)
    scores = jnp.einsum("BTU,BSU->BTS", rows, tokens, preferred_element_type=precise)
    weights = jax.nn.softmax(scores).astype(dtype)
    # First average the raw tokens: scales and projection of the values do not depend on the token,
    # so they can be applied after the sum over S.
    pooled = jnp.einsum("BTS,BSU->BTU", weights, tokens)
    pooled = pooled.reshape(batch, receivers, heads, -1) * value_scales
    return jnp.einsum("BTHU,UHK->BTHK", pooled, value_kernel.astype(dtype))
