"""Two products of a NAC, with faster forms for CPUs.

On CPUs, XLA sums the elementwise product over the examples, for the gradient of the scales, in a
loop that takes ten times as long as the same sum as a matrix product. It also has no depthwise
convolution there, and expands the gradient of its kernel to that of a dense one.
"""

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.nn.attention_cpu import fits
from common_jax.nn.mlp import INIT


def scale_by(x: Float[Array, "*B T D"], scales: Float[Array, "#T D"]) -> Float[Array, "*B T D"]:
    """x * scales, with the same scales for all examples."""
    # The sum over examples, which the other form speeds up, needs a batch axis and a scale for
    # every position; `fits`: a product sums in the dtype of its operands.
    if x.ndim < 3 or scales.shape != x.shape[-2:] or not fits(x.dtype):
        return x * scales
    return jax.lax.platform_dependent(x, scales, cpu=_scale, default=jnp.multiply)


class Depthwise(nn.Module):
    """Convolves each channel with a kernel of its own, with zero padding around the image.

    Parameters: `kernel` (side, side, 1, channels), `bias` (channels).
    """

    side: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B I J X"]) -> Float[Array, "B I J X"]:
        width = x.shape[-1]
        kernel = self.param("kernel", INIT, (self.side, self.side, 1, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        x, kernel, bias = (part.astype(self.dtype) for part in (x, kernel, bias))
        if fits(x.dtype):
            forms = {"cpu": _convolve_by_shifts, "default": _convolve}
            return jax.lax.platform_dependent(x, kernel, **forms) + bias
        return _convolve(x, kernel) + bias


@jax.custom_vjp
def _scale(x, scales):
    return x * scales


def _scale_forward(x, scales):
    return x * scales, (x, scales)


def _scale_backward(kept, dy):
    x, scales = kept
    # (examples, T D); the product with ones sums over the examples.
    rows = (dy * x).reshape(-1, scales.size)
    return dy * scales, (jnp.ones(len(rows), x.dtype) @ rows).reshape(scales.shape)


_scale.defvjp(_scale_forward, _scale_backward)


def _convolve(x, kernel):
    padding = [(kernel.shape[0] // 2, kernel.shape[0] // 2)] * 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@jax.custom_vjp
def _convolve_by_shifts(x, kernel):
    side, padded = len(kernel), _pad(x, len(kernel))

    # A loop over the kernel's rows, since unrolling all of its places takes long to compile.
    def add_row(i, y):
        return y + sum(_shift(padded, i, j, x.shape) * kernel[i, j] for j in range(side))

    return jax.lax.fori_loop(0, side, add_row, jnp.zeros_like(x))


def _shifts_forward(x, kernel):
    return _convolve_by_shifts(x, kernel), (x, kernel)


def _shifts_backward(kept, dy):
    x, kernel = kept
    side, padded = len(kernel), _pad(x, len(kernel))

    def row(i):
        # The gradient at place (i, j): the shifted image times dy, summed per channel.
        products = (_shift(padded, i, j, x.shape) * dy for j in range(side))
        return jnp.stack([jnp.sum(product, axis=(0, 1, 2)) for product in products])

    by_kernel = jax.lax.map(row, jnp.arange(side))
    # Sides are odd and the padding is symmetric, so the gradient of x is a convolution too: of dy,
    # with the mirrored kernel.
    return _convolve_by_shifts(dy, kernel[::-1, ::-1]), by_kernel[:, :, None]


_convolve_by_shifts.defvjp(_shifts_forward, _shifts_backward)


def _pad(x, side):
    return jnp.pad(x, [(0, 0), (side // 2, side // 2), (side // 2, side // 2), (0, 0)])


def _shift(padded, i, j, shape):
    """The image, of this shape, that place (i, j) of a kernel is multiplied with."""
    rows = jax.lax.dynamic_slice_in_dim(padded, i, shape[1], axis=1)
    return rows[:, :, j : j + shape[2]]
