"""Images to patch tokens."""

import math

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.nn import dense


class PatchEmbedding(nn.Module):
    """Cuts images into `patch` x `patch` squares, in raster order, and projects each to `width`.

    This is a convolution with kernel size and stride `patch`, written as one matrix product.

    Parameters: `kernel` (patch * patch * channels, D) and, if `use_bias`, `bias` (D); the rows of
      the kernel run over patch row, patch column, channel. Both are initialised by `kernel_init`;
      by default uniformly within 1 / sqrt(fan in), as PyTorch's convolutions.
    """

    patch: int
    width: int
    dtype: DTypeLike
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "B I J X"]) -> Float[Array, "B T D"]:
        batch, rows, columns, channels = images.shape
        if rows % self.patch or columns % self.patch:
            raise ValueError(
                f"images of {rows} x {columns} do not split into patches of {self.patch} x "
                f"{self.patch}"
            )
        grid = (rows // self.patch, columns // self.patch)
        squares = images.reshape(batch, grid[0], self.patch, grid[1], self.patch, channels)
        fan_in = self.patch * self.patch * channels
        patches = squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid[0] * grid[1], fan_in)
        init = self.kernel_init or _uniform(fan_in)
        kernel = self.param("kernel", init, (fan_in, self.width))
        bias = self.param("bias", init, (self.width,)) if self.use_bias else None
        patches, kernel, bias = nn.dtypes.promote_dtype(patches, kernel, bias, dtype=self.dtype)
        tokens = dense.matmul(patches, kernel)
        return tokens if bias is None else tokens + bias


def _uniform(fan_in: int) -> jax.nn.initializers.Initializer:
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )
