"""M-CLIP's text tower: XLM-RoBERTa, mean over tokens, projection into CLIP's space."""

import dataclasses
from typing import Annotated

from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from cliptrans_jax.towers.tower import TRANSFORMER_RULES, Sentences, Tower, require_heads
from common_jax.config import FieldError, Section
from common_jax.mesh import constrain, constrain_rows
from common_jax.nn import mlp
from common_jax.nn.attention import Implementation, SelfAttention
from common_jax.nn.mlp import INIT
from common_jax.nn.norm import LayerNorm
from common_jax.ranges import BelowOne, Count, Positive, Size, one_of

ACTIVATIONS = ("gelu",)  # keys of `common_jax.nn.mlp.ACTIVATIONS`


@dataclasses.dataclass(frozen=True)
class MClipConfig(Section):
    """Sizes of the tower; the defaults are those of M-CLIP/XLM-Roberta-Large-Vit-B-32.

    Attributes:
      vocab: number V of token ids.
      width: width D of a token.
      layers: blocks.
      heads: attention heads.
      hidden: hidden width F of the MLPs.
      positions: rows of the position table, of which the first `pad + 1` belong to no token.
      types: rows of the token type table, of which only row 0 is used.
      eps: epsilon of the LayerNorms.
      pad: id of padding.
      features: width M of a feature.
      dropout: dropout rate in training, of embeddings and branches but not of attention weights.
      activation: one of `ACTIVATIONS`.
      attention: implementation of attention: "auto", a fused kernel on GPUs and TPUs where it is
        faster, XLA elsewhere; "xla"; or "cudnn", in bfloat16 on GPUs only.
      kind: "mclip".
    """

    vocab: Size = 250002
    width: Size = 1024
    layers: Size = 24
    heads: Size = 16
    hidden: Size = 4096
    positions: Size = 514
    types: Size = 1
    eps: Positive = 1e-5
    pad: Count = 1
    features: Size = 512
    dropout: BelowOne = 0.1
    activation: Annotated[str, one_of(*ACTIVATIONS)] = "gelu"
    # Left out of the repr, which is part of the fingerprint of stored features: they do not depend
    # on the implementation, and were stored before there was a `kind`.
    attention: Implementation = dataclasses.field(default="auto", repr=False)
    kind: Annotated[str, one_of("mclip")] = dataclasses.field(default="mclip", repr=False)

    def __post_init__(self):
        super().__post_init__()
        require_heads(self.width, self.heads)
        if self.pad >= self.vocab:
            raise FieldError(f"pad={self.pad} must be below vocab={self.vocab}")
        if self.longest < 1:
            raise FieldError(
                f"positions={self.positions} must be at least {self.pad + 2}: rows up to "
                f"pad={self.pad} belong to no token"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest sentence."""
        return self.positions - self.pad - 1

    def places(self, ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
        """The row of the position table for each token."""
        return position_ids(ids, self.pad)


def position_ids(ids: Int[Array, "B S"], pad: int) -> Int[Array, "B S"]:
    """The row of the position table for each token: `pad` + its index among the non-pad tokens,
    counting from 1; `pad` for pads.

    It depends on the ids, not on a mask (XLM-RoBERTa, create_position_ids_from_input_ids).
    """
    real = (ids != pad).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + pad


class Embeddings(nn.Module):
    """norm(word + position + type 0).

    Parameters: `words` (V, D), `positions` (rows, D), `types` (types, D), `norm`. An id outside the
      vocabulary gives NaN, not the row of another word.
    """

    config: MClipConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids: Int[Array, "B S"], *, train: bool) -> Float[Array, "B S D"]:
        config = self.config
        words = self.param("words", INIT, (config.vocab, config.width))
        positions = self.param("positions", INIT, (config.positions, config.width))
        kinds = self.param("types", INIT, (config.types, config.width))
        x = constrain_rows(jnp.take(words, ids, axis=0, mode="fill"))
        x = x + constrain_rows(jnp.take(positions, config.places(ids), axis=0))
        # Type 0: a sentence stands alone. The types of pairs are not used here.
        x = LayerNorm(config.eps, self.dtype, name="norm")(x + kinds[0])
        return nn.Dropout(config.dropout, deterministic=not train)(x)


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)): post-norm, as in BERT."""

    config: MClipConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], visible: Bool[Array, "B 1 1 S"], *, train: bool
    ) -> Float[Array, "B S D"]:
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=not train)
        attention = SelfAttention(
            config.heads, True, self.dtype, attention=config.attention, name="attention"
        )
        y = attention(x, visible)
        x = LayerNorm(config.eps, self.dtype, name="attention_norm")(x + drop(y))
        activation = mlp.ACTIVATIONS[config.activation]
        y = mlp.Mlp(config.hidden, self.dtype, activation, name="mlp")(x)
        x = LayerNorm(config.eps, self.dtype, name="mlp_norm")(x + drop(y))
        return constrain(x, "batch", "tokens", "width")


class MClip(nn.Module):
    """Maps sentences to features: projects the mean over visible tokens, <s> and </s> included
    (M-CLIP, MultilingualCLIP).

    Features are not of unit length, and are float32 at least. Sows `intermediates`: `last_hidden`
    (B, S, D), including pads.
    """

    config: MClipConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "B S"],
        mask: Bool[Array, "B S"] | Int[Array, "B S"],
        *,
        train: bool = False,
    ) -> Float[Array, "B M"]:
        """Features of token ids.

        Args:
          ids: the tokens.
          mask: the tokens to attend to and to average; a row without any has mean 0.
          train: whether to apply dropout, with the RNG stream `dropout`.

        Raises:
          ValueError: if there are more tokens than the position table allows.
        """
        config = self.config
        # Beyond its table, `jnp.take` would return NaN instead of failing.
        if ids.shape[1] > config.longest:
            raise ValueError(
                f"ids have {ids.shape[1]} tokens, but positions={config.positions} allows "
                f"{config.longest}; truncate the sentences"
            )
        visible = mask != 0
        x = Embeddings(config, self.dtype, name="embeddings")(ids, train=train)
        x = constrain(x, "batch", "tokens", "width")
        for i in range(config.layers):
            block = Block(config, self.dtype, name=f"layer_{i}")
            x = block(x, visible[:, None, None, :], train=train)
        self.sow("intermediates", "last_hidden", x)
        # A mean sums up to hundreds of tokens, too many for bfloat16.
        exact = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(config.features, kernel_init=INIT, dtype=exact, name="projection")(
            _masked_mean(x.astype(exact), visible)
        )


def _masked_mean(x: Float[Array, "B S D"], visible: Bool[Array, "B S"]) -> Float[Array, "B D"]:
    total = jnp.sum(x, axis=1, where=visible[:, :, None])
    # At least 1, so that a row without visible tokens gives 0 instead of NaN.
    return total / jnp.maximum(jnp.sum(visible, axis=1, keepdims=True), 1)


PARTITION_RULES = (
    # Sharded along the width, since the published vocabulary, 250002, is not a multiple of 4.
    (r"/embeddings/(words|positions)$", P(None, "fsdp")),
    (r"/embeddings/types$", P()),
    *TRANSFORMER_RULES,
)


TOWER = Tower(
    kind="mclip",
    config=MClipConfig,
    network=MClip,
    rules=PARTITION_RULES,
    sentences=Sentences(
        tokenizer="xlmr", visible=lambda config, ids: ids != config.pad, drops_out=True
    ),
    from_scratch=True,
)
