"""CLIP's ResNet image tower, such as OpenAI's RN50x64.

For inference only; keep it frozen, since the batch norms' statistics are parameters.
"""

import dataclasses

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cliptrans_jax.towers.tower import CLIP_PICTURES, Tower, require_size
from common_jax.config import FieldError, Section
from common_jax.mesh import constrain
from common_jax.ranges import Positive, Size, Sizes

EXPANSION = 4  # ratio of a block's output channels to those of its 3 x 3 convolution
STRIDE = 32  # pixels per position of the last feature map
HEAD_WIDTH = 64
CONV_INIT = nn.initializers.he_normal()


@dataclasses.dataclass(frozen=True)
class ResNetConfig(Section):
    """Sizes of the tower; the defaults are those of RN50x64.

    Attributes:
      image: side of an image in pixels.
      layers: blocks in each stage.
      width: output channels of the stem.
      features: width M of a feature.
      eps: epsilon of every batch norm.
    """

    image: Size = 448
    layers: Sizes = (3, 15, 36, 10)
    width: Size = 128
    features: Size = 1024
    eps: Positive = 1e-5

    def __post_init__(self):
        super().__post_init__()
        if self.image % STRIDE:
            raise FieldError(f"image={self.image} must be a multiple of {STRIDE}")
        if len(self.layers) != 4:
            raise FieldError(f"layers={self.layers} must be four numbers")
        if self.width % 2:
            raise FieldError(f"width={self.width} must be even; the stem starts with half of it")

    @property
    def pooled_width(self) -> int:
        """Output channels D of the last stage."""
        return self.width * STRIDE

    @property
    def heads(self) -> int:
        """Heads of the attention pool."""
        return self.pooled_width // HEAD_WIDTH

    @property
    def tokens(self) -> int:
        """Number of positions in the last feature map, plus one for their mean."""
        return (self.image // STRIDE) ** 2 + 1


class FrozenBatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias, in float32 at least.

    Parameters: `mean`, `var`, `scale`, `bias` (D,).
    """

    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B I J D"]) -> Float[Array, "B I J D"]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        starts = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        exact = jnp.promote_types(self.dtype, jnp.float32)
        stored = {
            name: self.param(name, start, (x.shape[-1],)).astype(exact)
            for name, start in starts.items()
        }
        # Folded into y = gain x + shift: one multiplication and one addition per value.
        gain = stored["scale"] * jax.lax.rsqrt(stored["var"] + self.eps)
        y = x.astype(exact) * gain + (stored["bias"] - stored["mean"] * gain)
        return y.astype(self.dtype)


class Stem(nn.Module):
    """Three 3 x 3 convolutions, the first of stride 2, then 2 x 2 average pooling."""

    config: ResNetConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B I J 3"]) -> Float[Array, "B I//4 J//4 D"]:
        width = self.config.width
        for i, (channels, stride) in enumerate(((width // 2, 2), (width // 2, 1), (width, 1)), 1):
            x = _conv(channels, 3, self.dtype, f"conv_{i}", stride=stride)(x)
            x = nn.relu(FrozenBatchNorm(self.config.eps, self.dtype, name=f"norm_{i}")(x))
        return _average(x, 2)


class Bottleneck(nn.Module):
    """relu(x + convolutions of x), where the convolutions are 1 x 1, 3 x 3 and 1 x 1.

    Downsampling is by average pooling, not by strided convolution, to avoid aliasing. The first
    block of a stage also pools and projects its shortcut.
    """

    config: ResNetConfig
    channels: int
    stride: int
    first: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B I J _"]) -> Float[Array, "B _ _ D"]:
        y = nn.relu(self._norm("norm_1", _conv(self.channels, 1, self.dtype, "conv_1")(x)))
        y = nn.relu(self._norm("norm_2", _conv(self.channels, 3, self.dtype, "conv_2")(y)))
        y = _average(y, self.stride)
        wide = self.channels * EXPANSION
        y = self._norm("norm_3", _conv(wide, 1, self.dtype, "conv_3")(y))
        if self.first:
            x = _conv(wide, 1, self.dtype, "shortcut")(_average(x, self.stride))
            x = self._norm("shortcut_norm", x)
        return nn.relu(x + y)

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return FrozenBatchNorm(self.config.eps, self.dtype, name=name)(x)


class AttentionPool(nn.Module):
    """The mean of all positions attends to the positions and itself (CLIP, AttentionPool2d).

    Parameters: `positions` (positions + 1, D), the mean's first; `query`, `key`, `value` (D, D) and
    `out` (D, M), each with bias. Features are float32 at least.
    """

    config: ResNetConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B I J D"]) -> Float[Array, "B M"]:
        config = self.config
        batch, width = x.shape[0], config.pooled_width
        init = nn.initializers.normal(width**-0.5)
        exact = jnp.promote_types(self.dtype, jnp.float32)
        places = x.reshape(batch, -1, width)  # [B, I J, D]
        # Sums over hundreds of positions, too many for bfloat16.
        mean = jnp.mean(places.astype(exact), axis=1, keepdims=True).astype(x.dtype)
        positions = self.param("positions", init, (config.tokens, width)).astype(x.dtype)
        tokens = jnp.concatenate([mean, places], axis=1) + positions

        def project(tokens: jax.Array, name: str) -> jax.Array:
            y = nn.Dense(width, kernel_init=init, dtype=self.dtype, name=name)(tokens)
            return y.reshape(batch, -1, config.heads, HEAD_WIDTH)

        # Only the mean's output is used, so it is the only query.
        query = project(tokens[:, :1], "query")
        key, value = project(tokens, "key"), project(tokens, "value")
        pooled = jax.nn.dot_product_attention(query, key, value).reshape(batch, width)
        return nn.Dense(config.features, kernel_init=init, dtype=exact, name="out")(pooled)


class ClipResNet(nn.Module):
    """Maps images to features: stem, four stages of bottlenecks, attention pool (CLIP,
    ModifiedResNet).

    Features are not of unit length, and are float32 at least.
    """

    config: ResNetConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "B I J 3"]) -> Float[Array, "B M"]:
        """Features of images with normalised channels.

        Raises:
          ValueError: if their size is not the config's.
        """
        config = self.config
        require_size(images, config.image)
        x = Stem(config, self.dtype, name="stem")(images.astype(self.dtype))
        for stage, depth in enumerate(config.layers):
            for i in range(depth):
                # No stride in the first stage: the stem has already downsampled by 4.
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"stage_{stage}_block_{i}"
                channels = config.width * 2**stage
                x = Bottleneck(config, channels, stride, i == 0, self.dtype, name=name)(x)
            x = constrain(x, "batch", "tokens", "tokens", "width")
        return AttentionPool(config, self.dtype, name="attention_pool")(x)


def _conv(channels: int, side: int, dtype: DTypeLike, name: str, *, stride: int = 1) -> nn.Conv:
    # Padding as in torch: "SAME" would pad asymmetrically with stride 2.
    return nn.Conv(
        channels,
        (side, side),
        strides=stride,
        padding=side // 2,
        use_bias=False,
        kernel_init=CONV_INIT,
        dtype=dtype,
        name=name,
    )


def _average(x: Float[Array, "B I J D"], side: int) -> Float[Array, "B I//{side} J//{side} D"]:
    return nn.avg_pool(x, (side, side), strides=(side, side)) if side > 1 else x


# Kernels are sharded over fsdp along a channel axis; the rest is replicated.
PARTITION_RULES = (
    (r"/(conv_\d|shortcut)/kernel$", P(None, None, None, "fsdp")),
    (r"/attention_pool/positions$", P(None, "fsdp")),
    (r"/attention_pool/(query|key|value|out)/kernel$", P("fsdp")),
    (r"/(bias|scale|mean|var)$", P()),
)
TOWER = Tower(
    kind="clip_res",
    config=ResNetConfig,
    network=ClipResNet,
    rules=PARTITION_RULES,
    pictures=CLIP_PICTURES,
)
