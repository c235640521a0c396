"""The tokenizer of a NAC: a ConvNeXt trunk with a learned positional grid."""

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
from m2mkd_jax.nac.products import Depthwise

NORM_EPS = 1e-6  # in the trunk; the rest of NAC has 1e-5
STEM = 4
DEPTHWISE = 7
# Blocks per stage. A stage without blocks still has its convolution and norm.
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
      preset: blocks per stage, a key of PRESETS.
      stages: number of stages, up to three; each but the first halves the side.
      width: channels of the third stage, even if it is left out; each earlier stage has half as
        many as the next.
      stem: patch side of the first convolution, 4 in the original.
      grid_width: channels of the positional grid.
      grid_size: side of the grid; 0 for the side of the feature map.
      grid_resize: if the feature map has another size, "none" raises an error and "adaptive"
        averages the grid down or up to the size of the map.
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
                "of the channels"
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
        """Returns the side of a square image's feature map; every convolution rounds down."""
        return image_size // self.stem // 2 ** (self.stages - 1)


class Tokenizer(nn.Module):
    """ConvNeXt features concatenated with the positional grid, one token per place in raster order
    (NAC, ConvNeXtImageTokenizer). There is no norm after the last stage.

    Parameters: `stem` and `stem_norm`; `downsample_<stage>/norm`, `downsample_<stage>/conv`;
    `block_<stage>_<i>`; `grid` (rows, columns, grid width).
    """

    config: TokenizerConfig
    image_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "B I J X"]) -> Float[Array, "B S U"]:
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
        """Applies the convolution before a stage, and its norm.

        The norm comes after the stem, but before the other convolutions.
        """
        if stage == 0:
            x = _conv(width, self.config.stem, self.dtype, "stem")(x)
            return norm("stem_norm", self.dtype, NORM_EPS)(x)
        return Downsample(width, self.dtype, name=f"downsample_{stage}")(x)


class Downsample(nn.Module):
    """Norm, then a 2 x 2 convolution of stride 2."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B I J _"]) -> Float[Array, "B _ _ _"]:
        return _conv(self.width, 2, self.dtype, "conv")(norm("norm", self.dtype, NORM_EPS)(x))


class ConvNeXtBlock(nn.Module):
    """x + gamma * down(gelu(up(norm(depthwise(x))))), with a 7 x 7 depthwise convolution.

    Parameters: `depthwise`, `norm`, `up`, `down`, `gamma` (channels), initially 1e-6.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B I J _"]) -> Float[Array, "B I J _"]:
        width = x.shape[-1]
        y = Depthwise(DEPTHWISE, self.dtype, name="depthwise")(x)
        y = norm("norm", self.dtype, NORM_EPS)(y)
        layer = functools.partial(
            nn.Dense, kernel_init=INIT, dtype=self.dtype, dot_general=dense.product
        )
        y = gelu(layer(4 * width, name="up")(y))
        y = layer(width, name="down")(y)
        # So close to 0 that a block starts as the identity.
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
        return x + y * gamma.astype(self.dtype)


def fit_grid(
    grid: Float[Array, "_ _ _"], size: tuple[int, ...], *, resize: str
) -> Float[Array, "_ _ _"]:
    """Returns the grid in the size of a feature map.

    Raises:
      ValueError: if the sizes differ and `resize` is "none".
    """
    if grid.shape[:2] == size:
        return grid
    if resize == "none":
        raise ValueError(
            f"the positional grid is {grid.shape[:2]}, but the feature map is {size}: set "
            "config.model.tokenizer.grid_size to the side of the map (0 does that), or "
            "config.model.tokenizer.grid_resize to 'adaptive'"
        )
    # Rows, then columns: the mean over a rectangle is the mean of the means of its rows.
    for axis in (0, 1):
        bins = _adaptive_bins(grid.shape[axis], size[axis])
        parts = [jax.lax.slice_in_dim(grid, a, b, axis=axis).mean(axis) for a, b in bins]
        grid = jnp.stack(parts, axis)
    return grid


def _adaptive_bins(old: int, new: int) -> list[tuple[int, int]]:
    """Returns the range of old places to average for each new place i.

    It is floor(i old / new)..ceil((i + 1) old / new), as in PyTorch's adaptive pooling.
    """
    return [(i * old // new, -(-(i + 1) * old // new)) for i in range(new)]


def _conv(width: int, side: int, dtype: DTypeLike, name: str) -> nn.Conv:
    """Returns a convolution over non-overlapping squares of `side`."""
    return nn.Conv(
        width,
        (side, side),
        strides=(side, side),
        padding="VALID",
        kernel_init=INIT,
        dtype=dtype,
        name=name,
    )
