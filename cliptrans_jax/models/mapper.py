"""Mapping networks, from a CLIP feature to the P vectors of a decoder's prefix (CLIPTrans,
src/models/adapters.py)."""

import dataclasses
import functools
import math
from typing import Annotated, ClassVar

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.config import Section
from common_jax.mesh import constrain
from common_jax.nn.attention import SelfAttention
from common_jax.nn.norm import LayerNorm
from common_jax.ranges import BelowOne, Count, Size, key_of

EPSILON = 1e-5  # torch's default
HEADS = 2  # fixed in the original
SLOPE = 0.25  # initial value, as in torch


@dataclasses.dataclass(frozen=True)
class MapperConfig(Section):
    """The mapping network.

    Attributes:
      kind: "mlp", "hidden_mlp" or "transformer".
      prefix: number of prefix vectors; 0 for no mapping network.
      features: width of a CLIP feature.
      dropout: dropout rate of the transformer in training.
    """

    kind: Annotated[str, key_of(lambda: MAPPERS)] = "mlp"
    prefix: Count = 10
    features: Size = 512
    dropout: BelowOne = 0.1


class MlpMapper(nn.Module):
    """prelu(W x + b), split into P vectors."""

    drops: ClassVar[bool] = False
    config: MapperConfig
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, features: Float[Array, "B M"], train: bool) -> Float[Array, "B P D"]:
        config = self.config
        out = _linear(config.features, config.prefix * self.width, self.dtype, "out")
        return _cut(_PRelu(name="prelu")(out(features)), config.prefix)


class HiddenMlpMapper(nn.Module):
    """prelu(W2 relu(W1 x + b1) + b2), split into P vectors."""

    drops: ClassVar[bool] = False
    config: MapperConfig
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, features: Float[Array, "B M"], train: bool) -> Float[Array, "B P D"]:
        config = self.config
        hidden = _linear(config.features, self.width, self.dtype, "hidden")(features)
        out = _linear(self.width, config.prefix * self.width, self.dtype, "out")
        return _cut(_PRelu(name="prelu")(out(nn.relu(hidden))), config.prefix)


class TransformerMapper(nn.Module):
    """W x + b, split into P tokens, then one post-norm transformer layer over them without
    positions or mask: 2 heads, an MLP with D // 3 hidden units and ReLU."""

    drops: ClassVar[bool] = True
    config: MapperConfig
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, features: Float[Array, "B M"], train: bool) -> Float[Array, "B P D"]:
        config, width = self.config, self.width
        drop = nn.Dropout(config.dropout, deterministic=not train)
        norm = functools.partial(LayerNorm, EPSILON, self.dtype, fast_variance=True)
        project = _linear(config.features, config.prefix * width, self.dtype, "project")
        x = _cut(project(features), config.prefix)
        # As torch.nn.TransformerEncoderLayer, but without dropout of attention weights.
        attention = SelfAttention(
            HEADS,
            True,
            self.dtype,
            init=_uniform(math.sqrt(6 / (4 * width))),  # Xavier, for the stacked [3D, D]
            out_init=_uniform(1 / math.sqrt(width)),
            name="attention",
        )
        x = norm(name="attention_norm")(x + drop(attention(x)))
        hidden = nn.relu(_linear(width, width // 3, self.dtype, "up")(x))
        branch = _linear(width // 3, width, self.dtype, "down")(drop(hidden))
        return norm(name="mlp_norm")(x + drop(branch))


MAPPERS = {"mlp": MlpMapper, "hidden_mlp": HiddenMlpMapper, "transformer": TransformerMapper}


def build(config: MapperConfig, width: int, dtype: DTypeLike) -> nn.Module:
    """The mapping network of `config` for a decoder of `width`; `config.prefix` must not be 0."""
    return MAPPERS[config.kind](config, width, dtype)


class _PRelu(nn.Module):
    """max(x, 0) + slope min(x, 0), with one learned slope."""

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        slope = self.param("slope", nn.initializers.constant(SLOPE), (1,))
        return jnp.where(x >= 0, x, slope.astype(x.dtype) * x)


def _cut(x: Float[Array, "B D"], count: int) -> Float[Array, "B {count} _"]:
    # Consecutive outputs form a vector, as in the original, so that published weights fit. They are
    # gathered first: `fsdp` splits the layer's outputs, whose shares need not be whole vectors.
    x = constrain(x, "batch", "width")
    return constrain(x.reshape(x.shape[0], count, -1), "batch", "tokens", "width")


def _linear(fan_in: int, fan_out: int, dtype: DTypeLike, name: str) -> nn.Dense:
    """A dense layer with PyTorch's initialisation, uniform within ±1 / sqrt(fan in)."""
    init = _uniform(1 / math.sqrt(fan_in))
    return nn.Dense(fan_out, kernel_init=init, bias_init=init, dtype=dtype, name=name)


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


# The hidden axis of `up` and `down`, a third of the width (341 for 1,024), cannot be sharded.
PARTITION_RULES = (
    (r"/(project|out|down)/kernel$", P(None, "fsdp")),
    (r"/(hidden|up)/kernel$", P("fsdp", None)),
    (r"/qkv/kernel$", P("fsdp")),
    (r"/(bias|scale|slope)$", P()),
)
