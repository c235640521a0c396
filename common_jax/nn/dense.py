"""The matrix product of dense layers, with a backward pass suited to the platform, and the
precision of float32 products."""

import contextlib
import functools
import math
from typing import Annotated, Any

import jax
from jax.custom_derivatives import SymbolicZero

from common_jax.ranges import one_of

# The type of config fields; docs/performance.md says what each value means on a platform.
MatmulPrecision = Annotated[str, one_of("default", "high", "highest")]


def matmul_precision(name: str) -> contextlib.AbstractContextManager:
    """A context to trace programs in, which sets the precision of their float32 products.

    "default" leaves it to JAX, and so to JAX_DEFAULT_MATMUL_PRECISION.
    """
    return contextlib.nullcontext() if name == "default" else jax.default_matmul_precision(name)


def product(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, *, precision: Any = None
) -> jax.Array:
    """`jax.lax.dot_general` for flax's layers: contracts the last axes of `x` with the first of
    `kernel`.

    On CPU, gradients are computed as products of two matrices, with all tokens of a batch as rows.
    In jax's own derivative, a kernel's gradient contracts two axes, examples and tokens. XLA's CPU
    compiler then makes transposed copies of both operands, and recomputes their contents for each
    copy: in a ViT of 12 blocks, the gradients of all later residuals for every kernel. On other
    platforms, gradients are jax's own, since merging two axes costs a copy on TPUs. A kernel or
    input that is not trained gets no gradient.
    """
    (contracted, _), batch = dimension_numbers
    assert not any(batch) and x.dtype == kernel.dtype, (batch, x.dtype, kernel.dtype)
    assert contracted == tuple(range(x.ndim - len(contracted), x.ndim)), contracted
    return _product(len(contracted), precision, x, kernel)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel, with the gradients of `product`; `kernel` is a matrix with x's dtype."""
    return product(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _plain(count: int, precision: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    axes = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
    return jax.lax.dot_general(x, kernel, (axes, ((), ())), precision=precision)


_product = jax.custom_vjp(_plain, nondiff_argnums=(0, 1))


def _forward(count: int, precision: Any, x: Any, kernel: Any):
    """The product, and the arrays needed for the requested gradients."""
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return _plain(count, precision, x.value, kernel.value), kept


def _backward(count: int, precision: Any, kept: tuple[Any, Any], dy: Any):
    x, kernel = kept
    if isinstance(dy, SymbolicZero):
        return None, None
    return _by_x(count, precision, kernel, dy), _by_kernel(count, precision, x, dy)


def _by_x(count: int, precision: Any, kernel: jax.Array | None, dy: jax.Array):
    if kernel is None:
        return None
    free = dy.shape[: dy.ndim - kernel.ndim + count]
    shape = (*free, *kernel.shape[:count])

    def derived(count: int, shape: tuple[int, ...], kernel: jax.Array, dy: jax.Array):
        # The product is linear in x, so this is the gradient that jax itself would derive.
        x = jax.ShapeDtypeStruct(shape, kernel.dtype)
        return jax.linear_transpose(lambda x: _plain(count, precision, x, kernel), x)(dy)[0]

    def of_rows(kernel: jax.Array, dy: jax.Array):
        width, rows = math.prod(kernel.shape[:count]), math.prod(free)
        matrices = kernel.reshape(width, -1), dy.reshape(rows, -1)
        return derived(1, (rows, width), *matrices).reshape(shape)

    default = functools.partial(derived, count, shape)
    return jax.lax.platform_dependent(kernel, dy, cpu=of_rows, default=default)


def _by_kernel(count: int, precision: Any, x: jax.Array | None, dy: jax.Array):
    if x is None:
        return None
    shape = (*x.shape[x.ndim - count :], *dy.shape[x.ndim - count :])

    def derived(count: int, shape: tuple[int, ...], x: jax.Array, dy: jax.Array):
        kernel = jax.ShapeDtypeStruct(shape, x.dtype)
        times = functools.partial(_plain, count, precision, x)
        return jax.linear_transpose(times, kernel)(dy)[0]

    def of_rows(x: jax.Array, dy: jax.Array):
        width = math.prod(shape[:count])
        rows = x.reshape(-1, width)
        dy = dy.reshape(len(rows), -1)
        return derived(1, (width, dy.shape[1]), rows, dy).reshape(shape)

    default = functools.partial(derived, count, shape)
    return jax.lax.platform_dependent(x, dy, cpu=of_rows, default=default)


_product.defvjp(_forward, _backward, symbolic_zeros=True)
