"""CLIP's transformer towers, for images and for English text."""

import dataclasses
from typing import Annotated, Any

from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from cliptrans_jax.towers.tower import (
    CLIP_PICTURES,
    TRANSFORMER_RULES,
    Sentences,
    Tower,
    require_heads,
    require_length,
    require_size,
)
from common_jax.config import FieldError, Section
from common_jax.mesh import constrain, constrain_rows
from common_jax.nn import mlp
from common_jax.nn.attention import Implementation, SelfAttention
from common_jax.nn.mlp import INIT
from common_jax.nn.norm import LayerNorm
from common_jax.nn.patches import PatchEmbedding
from common_jax.ranges import Positive, Size, one_of

ACTIVATIONS = ("gelu", "quick_gelu")  # keys of `common_jax.nn.mlp.ACTIVATIONS`


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(Section):
    """Sizes of an image tower; the defaults are those of openai/clip-vit-base-patch32.

    Attributes:
      image: side of an image in pixels.
      patch: side of a patch in pixels.
      width: width D of a token.
      layers: blocks.
      heads: attention heads.
      hidden: hidden width F of the MLPs.
      eps: epsilon of the LayerNorms.
      features: width M of a feature.
      activation: one of `ACTIVATIONS`.
      attention: implementation of attention: "auto", a fused kernel on GPUs and TPUs where it is
        faster, XLA elsewhere; "xla"; or "cudnn", in bfloat16 on GPUs only.
      kind: "clip_vision".
    """

    image: Size = 224
    patch: Size = 32
    width: Size = 768
    layers: Size = 12
    heads: Size = 12
    hidden: Size = 3072
    eps: Positive = 1e-5
    features: Size = 512
    activation: Annotated[str, one_of(*ACTIVATIONS)] = "quick_gelu"
    # Left out of the repr, which is part of the fingerprint of stored features: they do not depend
    # on the implementation, and were stored before there was a `kind`.
    attention: Implementation = dataclasses.field(default="auto", repr=False)
    kind: Annotated[str, one_of("clip_vision")] = dataclasses.field(
        default="clip_vision", repr=False
    )

    def __post_init__(self):
        super().__post_init__()
        require_heads(self.width, self.heads)
        if self.image % self.patch:
            raise FieldError(f"patch={self.patch} must divide image={self.image}")

    @property
    def tokens(self) -> int:
        """The patches and the class token."""
        return (self.image // self.patch) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class ClipTextConfig(Section):
    """Sizes of a text tower; the defaults are those of openai/clip-vit-base-patch32.

    Attributes:
      vocab: number V of token ids.
      positions: tokens in the longest sentence.
      The other fields are as in `ClipVisionConfig`.
    """

    vocab: Size = 49408
    positions: Size = 77
    width: Size = 512
    layers: Size = 12
    heads: Size = 8
    hidden: Size = 2048
    eps: Positive = 1e-5
    features: Size = 512
    activation: Annotated[str, one_of(*ACTIVATIONS)] = "quick_gelu"
    # Left out of the repr, as in `ClipVisionConfig`.
    attention: Implementation = dataclasses.field(default="auto", repr=False)

    def __post_init__(self):
        super().__post_init__()
        require_heads(self.width, self.heads)

    @property
    def longest(self) -> int:
        """Tokens of the longest sentence."""
        return self.positions


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      config: must have `heads`, `hidden`, `eps`, `activation` and `attention`.
    """

    config: Any
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], visible: Bool[Array, "#B 1 T T"] | None
    ) -> Float[Array, "B T D"]:
        config = self.config
        y = LayerNorm(config.eps, self.dtype, name="attention_norm")(x)
        attention = SelfAttention(
            config.heads, True, self.dtype, attention=config.attention, name="attention"
        )
        x = x + attention(y, visible)
        y = LayerNorm(config.eps, self.dtype, name="mlp_norm")(x)
        activation = mlp.ACTIVATIONS[config.activation]
        y = mlp.Mlp(config.hidden, self.dtype, activation, name="mlp")(y)
        return constrain(x + y, "batch", "tokens", "width")


class ClipVision(nn.Module):
    """Maps images to features: the class token after the blocks, normalised and projected (CLIP,
    CLIPVisionModelWithProjection).

    Features are not of unit length, and are float32 at least. Sows `intermediates`: `embedded`
    (B, T, D) after the first norm, `last_hidden` (B, T, D), `pooled` (B, D) after the last norm.
    """

    config: ClipVisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "B I J 3"]) -> Float[Array, "B M"]:
        """Features of images with normalised channels.

        Raises:
          ValueError: if their size is not the config's.
        """
        config = self.config
        require_size(images, config.image)
        patches = PatchEmbedding(
            config.patch, config.width, self.dtype, use_bias=False, kernel_init=INIT, name="patches"
        )(images)
        class_token = self.param("class_token", INIT, (config.width,)).astype(patches.dtype)
        positions = self.param("positions", INIT, (config.tokens, config.width))
        first = jnp.broadcast_to(class_token, (images.shape[0], 1, config.width))
        x = jnp.concatenate([first, patches], axis=1) + positions.astype(patches.dtype)
        # A norm before the blocks too, which most ViTs lack.
        x = constrain(
            LayerNorm(config.eps, self.dtype, name="pre_norm")(x), "batch", "tokens", "width"
        )
        self.sow("intermediates", "embedded", x)
        for i in range(config.layers):
            x = Block(config, self.dtype, name=f"layer_{i}")(x, None)
        self.sow("intermediates", "last_hidden", x)
        # Only the class token's state is used, so only that is normalised.
        x = LayerNorm(config.eps, self.dtype, name="post_norm")(x[:, 0])
        self.sow("intermediates", "pooled", x)
        return _projection(config, self.dtype)(x)


class ClipText(nn.Module):
    """Maps token ids to features: the state of the end token, normalised and projected (CLIP,
    CLIPTextModelWithProjection).

    Attention is causal. Features are not of unit length, and are float32 at least. Sows
    `intermediates`: `last_hidden` (B, S, D) after the last norm.

    Parameters: `words` (V, D), `positions` (positions, D), the blocks, `final_norm`, `projection`.
      An id outside the vocabulary gives NaN, not the row of another word.
    """

    config: ClipTextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, ids: Int[Array, "B S"], mask: Bool[Array, "B S"] | Int[Array, "B S"] | None
    ) -> Float[Array, "B M"]:
        """Features of token ids.

        Args:
          ids: the tokens; the end token has the largest id in a sentence.
          mask: the tokens to attend to; None for all. Has no effect after the end token.

        Raises:
          ValueError: if there are more tokens than positions.
        """
        config = self.config
        length = ids.shape[1]
        require_length(length, config.positions)
        words = self.param("words", INIT, (config.vocab, config.width))
        positions = self.param("positions", INIT, (config.positions, config.width))
        x = constrain_rows(jnp.take(words, ids, axis=0, mode="fill")) + positions[:length]
        x = constrain(x.astype(self.dtype), "batch", "tokens", "width")
        visible = jnp.tri(length, dtype=bool)[None, None]
        if mask is not None:
            visible = visible & (mask != 0)[:, None, None, :]
        for i in range(config.layers):
            x = Block(config, self.dtype, name=f"layer_{i}")(x, visible)
        x = LayerNorm(config.eps, self.dtype, name="final_norm")(x)
        self.sow("intermediates", "last_hidden", x)
        pooled = jnp.take_along_axis(x, end_position(ids)[:, None, None], axis=1)[:, 0]
        return _projection(config, self.dtype)(pooled)


def end_position(ids: Int[Array, "B S"]) -> Int[Array, " B"]:
    """The position of the end token: that of the first largest id, since pads may be end tokens
    too."""
    return jnp.argmax(ids, axis=1)


def _projection(config: ClipVisionConfig | ClipTextConfig, dtype: DTypeLike) -> nn.Dense:
    # Features are stored in float32, so their product is not rounded to bfloat16.
    exact = jnp.promote_types(dtype, jnp.float32)
    return nn.Dense(
        config.features, use_bias=False, kernel_init=INIT, dtype=exact, name="projection"
    )


PARTITION_RULES = (  # for both towers
    (r"/words$", P(None, "fsdp")),
    (r"/patches/kernel$", P(None, "fsdp")),
    (r"/(class_token|positions)$", P()),
    *TRANSFORMER_RULES,
)


TEXT = Tower(
    kind="clip_text",
    config=ClipTextConfig,
    network=ClipText,
    rules=PARTITION_RULES,
    # No mask is needed: attention is causal, and pads come last.
    sentences=Sentences(tokenizer="clip", visible=lambda config, ids: None, drops_out=False),
)
VISION = Tower(
    kind="clip_vision",
    config=ClipVisionConfig,
    network=ClipVision,
    rules=PARTITION_RULES,
    pictures=CLIP_PICTURES,
    from_scratch=True,
)
