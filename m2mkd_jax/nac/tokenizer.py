"""Images to tokens: a ConvNeXt trunk and a learned positional grid beside its features."""

import dataclasses
import functools
import types
from typing import Annotated

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.config import FieldError, Section
from common_jax.nn import dense
from common_jax.nn.mlp import INIT, gelu
from common_jax.ranges import Count, Size, one_of
from m2mkd_jax.nac.layers import norm

NORM_EPS = 1e-6  # of the trunk; the rest of NAC has 1e-5
STEM = 4
DEPTHWISE = 7
# Blocks a stage.
PRESETS = types.MappingProxyType(
    {
        "tiny": (3, 3, 9),
        "mini": (3, 3, 6),
        "micro": (3, 3, 3),
        "nano": (1, 1, 1),
        "pico": (1, 1, 0),
        "femto": (1, 0, 0),
        "atto": (0, 0, 0),
    }
)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Section):
    """Sizes of the tokenizer, `config.model.tokenizer`.

    Attributes:
      preset: blocks a stage, a key of PRESETS.
      stages: how many of the three stages there are; each but the first halves the side.
      width: channels of the third stage; a stage before has half, whether the third is there or
        not.
      stem: side of the first convolution's patches, 4 in the original.
      grid_width: channels of the positional grid.
      grid_size: side of the grid; 0 for that of the feature map.
      grid_resize: what to do about another feature map: "none" refuses it, "adaptive" averages
        the grid to its size.
    """

    preset: Annotated[str, one_of(*PRESETS)] = "tiny"
    stages: Annotated[int, one_of(1, 2, 3)] = 2
    width: Size = 384
    stem: Size = STEM
    grid_width: Size = 64
    grid_size: Count = 0
    grid_resize: Annotated[str, one_of("none", "adaptive")] = "none"

    def __post_init__(self):
        super().__post_init__()
        if self.width % 4:
            raise FieldError(
                f"width={self.width} must be a multiple of 4, since the first stage has a quarter "
                "of it"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return (self.width // 4, self.width // 2, self.width)[: self.stages]

    @property
    def token_width(self) -> int:
        """Width U of a token: the last stage's channels and the grid's."""
        return self.widths[-1] + self.grid_width

    def side(self, image_size: int) -> int:
        """Side of the feature map of a square image; every convolution rounds down."""
        return image_size // self.stem // 2 ** (self.stages - 1)


class Tokenizer(nn.Module):
    """ConvNeXt features and the positional grid, one token a place in raster order (NAC,
    ConvNeXtImageTokenizer).

    Parameters: `stem` and `stem_norm`; `downsample_S/norm`, `downsample_S/conv`; `block_S_I`;
      `grid` (rows, columns, grid width). There is no norm behind the last stage.
    """

    config: TokenizerConfig
    image_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "B I J Ch"]) -> Float[Array, "B S U"]:
        config = self.config
        x = images.astype(self.dtype)
        for stage, width in enumerate(config.widths):
            x = self._enter(x, stage, width)
            for i in range(PRESETS[config.preset][stage]):
                x = ConvNeXtBlock(self.dtype, name=f"block_{stage}_{i}")(x)
        side = config.grid_size or config.side(self.image_size)
        shape = (side, side, config.grid_width)
        grid = self.param("grid", nn.initializers.normal(1.0), shape)
        grid = fit_grid(grid, x.shape[1:3], resize=config.grid_resize).astype(self.dtype)
        grid = jnp.broadcast_to(grid, (*x.shape[:3], config.grid_width))
        tokens = jnp.concatenate([x, grid], axis=-1)
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])

    def _enter(self, x: jax.Array, stage: int, width: int) -> jax.Array:
        """The convolution in front of a stage, and its norm: behind the stem, before the others."""
        if stage == 0:
            x = _conv(width, self.config.stem, self.dtype, "stem")(x)
            return norm("stem_norm", self.dtype, NORM_EPS)(x)
        return Downsample(width, self.dtype, name=f"downsample_{stage}")(x)


class Downsample(nn.Module):
    """Norm, then a convolution of side and stride 2."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B I J _"]) -> Float[Array, "B _ _ _"]:
        return _conv(self.width, 2, self.dtype, "conv")(norm("norm", self.dtype, NORM_EPS)(x))


class ConvNeXtBlock(nn.Module):
    """x + gamma * down(gelu(up(norm(depthwise(x))))), the convolution of side 7.

    Parameters: `depthwise`, `norm`, `up`, `down`, `gamma` (channels), first 1e-6.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B I J _"]) -> Float[Array, "B I J _"]:
        width = x.shape[-1]
        y = nn.Conv(
            width,
            (DEPTHWISE, DEPTHWISE),
            padding=DEPTHWISE // 2,
            feature_group_count=width,
            kernel_init=INIT,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        y = norm("norm", self.dtype, NORM_EPS)(y)
        layer = functools.partial(
            nn.Dense, kernel_init=INIT, dtype=self.dtype, dot_general=dense.product
        )
        y = gelu(layer(4 * width, name="up")(y))
        y = layer(width, name="down")(y)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
        return x + y * gamma.astype(self.dtype)


def fit_grid(
    grid: Float[Array, "_ _ _"], size: tuple[int, ...], *, resize: str
) -> Float[Array, "_ _ _"]:
    """The grid for a feature map of `size`.

    Raises:
      ValueError: when the sizes differ and `resize` is "none".
    """
    if grid.shape[:2] == size:
        return grid
    if resize == "none":
        raise ValueError(
            f"the positional grid is {grid.shape[:2]} and the feature map {size}: set "
            "config.model.tokenizer.grid_size to the side of the map (0 does), or "
            "config.model.tokenizer.grid_resize to 'adaptive'"
        )
    for axis in (0, 1):
        bins = _adaptive_bins(grid.shape[axis], size[axis])
        parts = [jax.lax.slice_in_dim(grid, a, b, axis=axis).mean(axis) for a, b in bins]
        grid = jnp.stack(parts, axis)
    return grid


def _adaptive_bins(old: int, new: int) -> list[tuple[int, int]]:
    """Ranges of old places that average to each new one, floor(i old / new)..ceil((i + 1) old /
    new)."""
    return [(i * old // new, -(-(i + 1) * old // new)) for i in range(new)]


def _conv(width: int, side: int, dtype: DTypeLike, name: str) -> nn.Conv:
    """A convolution that cuts the image into squares of `side`."""
    return nn.Conv(
        width,
        (side, side),
        strides=(side, side),
        padding="VALID",
        kernel_init=INIT,
        dtype=dtype,
        name=name,
    )
