"""SigLIP 2's towers, for pictures of one size and for texts of many languages (Tschannen et al.
2025, arXiv 2502.14786)."""

import dataclasses
from typing import Annotated

from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from cliptrans_jax.towers.clip import Block
from cliptrans_jax.towers.tower import (
    TRANSFORMER_RULES,
    Pictures,
    Sentences,
    Tower,
    require_heads,
    require_length,
    require_size,
)
from common_jax.config import FieldError, Section
from common_jax.mesh import constrain, constrain_rows
from common_jax.nn import mlp
from common_jax.nn.attention import Implementation
from common_jax.nn.mlp import INIT
from common_jax.nn.norm import LayerNorm
from common_jax.nn.patches import PatchEmbedding
from common_jax.nn.pooling import AttentionPool
from common_jax.ranges import Count, Positive, Size, one_of

ACTIVATION = "gelu_tanh"  # in all published models


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(Section):
    """Sizes of an image tower; the defaults are those of google/siglip2-base-patch16-224.

    Attributes:
      kind: "siglip_vision".
      image: side of an image in pixels.
      patch: side of a patch in pixels.
      width: width D of a token, which is also the width M of a feature.
      layers: blocks.
      heads: attention heads, in the blocks and in the pool.
      hidden: hidden width F of the MLPs.
      eps: epsilon of every LayerNorm.
      attention: implementation of attention: "auto", a fused kernel on GPUs and TPUs where it is
        faster, XLA elsewhere; "xla"; or "cudnn", in bfloat16 on GPUs only.
    """

    kind: Annotated[str, one_of("siglip_vision")] = "siglip_vision"
    image: Size = 224
    patch: Size = 16
    width: Size = 768
    layers: Size = 12
    heads: Size = 12
    hidden: Size = 3072
    eps: Positive = 1e-6
    # Left out of the repr, which is part of the fingerprint of stored features: they do not depend
    # on the implementation.
    attention: Implementation = dataclasses.field(default="auto", repr=False)

    activation = ACTIVATION  # without a type, so that it is not a field

    def __post_init__(self):
        super().__post_init__()
        require_heads(self.width, self.heads)
        if self.patch > self.image:
            raise FieldError(f"patch={self.patch} must be at most image={self.image}")

    @property
    def features(self) -> int:
        """Width M of a feature."""
        return self.width

    @property
    def covered(self) -> int:
        """Side of the area of an image that is covered by whole patches."""
        return self.image - self.image % self.patch

    @property
    def tokens(self) -> int:
        """The patches."""
        return (self.image // self.patch) ** 2


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig(Section):
    """Sizes of a text tower; the defaults are those of google/siglip2-base-patch16-224.

    Attributes:
      kind: "siglip_text".
      vocab: number V of token ids.
      positions: tokens in every sentence; shorter ones are padded.
      width: width D of a token.
      layers: blocks.
      heads: attention heads.
      hidden: hidden width F of the MLPs.
      eps: epsilon of every LayerNorm.
      features: width M of a feature.
      pad: id of padding.
      attention: as in `SiglipVisionConfig`.
    """

    kind: Annotated[str, one_of("siglip_text")] = "siglip_text"
    vocab: Size = 256000
    positions: Size = 64
    width: Size = 768
    layers: Size = 12
    heads: Size = 12
    hidden: Size = 3072
    eps: Positive = 1e-6
    features: Size = 768
    pad: Count = 0
    # Left out of the repr, as in `SiglipVisionConfig`.
    attention: Implementation = dataclasses.field(default="auto", repr=False)

    activation = ACTIVATION  # without a type, so that it is not a field

    def __post_init__(self):
        super().__post_init__()
        require_heads(self.width, self.heads)
        if self.pad >= self.vocab:
            raise FieldError(f"pad={self.pad} must be below vocab={self.vocab}")

    @property
    def longest(self) -> int:
        """Tokens of the longest sentence."""
        return self.positions


class SiglipVision(nn.Module):
    """Maps images to features: the patches after the blocks, normalised and pooled by attention
    (SigLIP, SiglipVisionModel).

    Features are not of unit length, and are float32 at least. Sows `intermediates`: `last_hidden`
    (B, T, D) after the last norm.
    """

    config: SiglipVisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "B I J 3"]) -> Float[Array, "B M"]:
        """Features of images with normalised channels.

        Raises:
          ValueError: if their size is not the config's.
        """
        config, exact = self.config, jnp.promote_types(self.dtype, jnp.float32)
        require_size(images, config.image)
        # Patches of size 14 do not cover the last six of 384 pixels. SigLIP's convolution ignores
        # them, and `PatchEmbedding` would refuse them.
        images = images[:, : config.covered, : config.covered]
        embed = PatchEmbedding(
            config.patch, config.width, self.dtype, kernel_init=INIT, name="patches"
        )
        positions = self.param("positions", INIT, (config.tokens, config.width))
        x = embed(images) + positions.astype(self.dtype)
        x = constrain(x, "batch", "tokens", "width")
        for i in range(config.layers):
            x = Block(config, self.dtype, name=f"layer_{i}")(x, None)
        x = LayerNorm(config.eps, self.dtype, name="final_norm")(x)
        self.sow("intermediates", "last_hidden", x)
        # In float32 at least: no projection follows, so the pool's output is the feature.
        return AttentionPool(
            config.heads,
            config.hidden,
            mlp.ACTIVATIONS[config.activation],
            config.eps,
            exact,
            stacked=True,
            name="pool",
        )(x)


class SiglipText(nn.Module):
    """Maps token ids to features: the state of the last token, normalised and projected (SigLIP,
    SiglipTextModel).

    Every sentence is padded to `positions` here, so the number of pads in `ids` has no effect. All
    tokens attend to all others, pads included, and in most sentences the last token is a pad.
    Features are not of unit length, and are float32 at least. Sows `intermediates`: `last_hidden`
    (B, positions, D) after the last norm.

    Parameters: `words` (V, D), `positions` (positions, D), the blocks, `final_norm`, `projection`.
      An id outside the vocabulary gives NaN, not the row of another word.
    """

    config: SiglipTextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids: Int[Array, "B S"], visible: None = None) -> Float[Array, "B M"]:
        """Features of token ids.

        Args:
          ids: the tokens.
          visible: unused, since no token is masked.

        Raises:
          ValueError: if there are more tokens than positions.
        """
        config, length = self.config, ids.shape[1]
        require_length(length, config.positions)
        ids = jnp.pad(ids, ((0, 0), (0, config.positions - length)), constant_values=config.pad)
        words = self.param("words", INIT, (config.vocab, config.width))
        positions = self.param("positions", INIT, (config.positions, config.width))
        x = constrain_rows(jnp.take(words, ids, axis=0, mode="fill")) + positions
        x = constrain(x.astype(self.dtype), "batch", "tokens", "width")
        for i in range(config.layers):
            x = Block(config, self.dtype, name=f"layer_{i}")(x, None)
        x = LayerNorm(config.eps, self.dtype, name="final_norm")(x)
        self.sow("intermediates", "last_hidden", x)
        exact = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(config.features, kernel_init=INIT, dtype=exact, name="projection")(x[:, -1])


PARTITION_RULES = (  # for both towers
    (r"/words$", P(None, "fsdp")),
    (r"/patches/kernel$", P(None, "fsdp")),
    (r"/(probe|positions)$", P()),
    *TRANSFORMER_RULES,
)


TEXT = Tower(
    kind="siglip_text",
    config=SiglipTextConfig,
    network=SiglipText,
    rules=PARTITION_RULES,
    sentences=Sentences(tokenizer="siglip2", visible=lambda config, ids: None, drops_out=False),
    from_scratch=True,
)
VISION = Tower(
    kind="siglip_vision",
    config=SiglipVisionConfig,
    network=SiglipVision,
    rules=PARTITION_RULES,
    pictures=Pictures(mean=(0.5,) * 3, std=(0.5,) * 3, resampling="BILINEAR", crops=False),
    from_scratch=True,
)
