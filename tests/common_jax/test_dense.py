"""The product in dense layers: like jax's own, with gradients as products of two matrices."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from common_jax.nn import dense

SHAPES = {
    "a width": ((3, 5, 8), (8, 6)),
    "to heads": ((3, 5, 8), (8, 3, 2, 4)),
    "from heads": ((3, 5, 2, 4), (2, 4, 8)),
    "rows": ((5, 8), (8, 6)),
}


def numbers(shapes):
    kernel_axes = 2 if len(shapes[1]) == 3 else 1
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    axes = tuple(range(x.ndim - kernel_axes, x.ndim)), tuple(range(kernel_axes))
    return x, kernel, (axes, ((), ()))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_match_dot_general(shapes, dtype):
    x, kernel, dimensions = numbers(shapes)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    results = []
    for times in (jax.lax.dot_general, dense.product):
        y, vjp = jax.vjp(lambda x, kernel, times=times: times(x, kernel, dimensions), x, kernel)
        results.append((y, *vjp(jnp.cos(y))))
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        wanted, got = (np.asarray(a, np.float32) for a in (wanted, got))
        np.testing.assert_allclose(got, wanted, atol=tolerance * abs(wanted).max())


def test_kernel_gradient_on_cpu_contracts_rows_only():
    x, kernel, dimensions = numbers(SHAPES["a width"])

    def loss(kernel, times):
        return jnp.sum(jnp.sin(times(x, kernel, dimensions)))

    def text(times):
        return jax.jit(jax.grad(lambda kernel: loss(kernel, times))).lower(kernel).as_text()

    assert "contracting_dims = [0, 1] x [0, 1]" in text(jax.lax.dot_general)
    assert "contracting_dims = [0, 1] x [0, 1]" not in text(dense.product)


def test_untrained_operand_gets_no_gradient():
    x, kernel, dimensions = numbers(SHAPES["to heads"])
    for place in (0, 1):
        operands = [x, kernel]

        def loss(part, place=place, operands=operands):
            given = [part if i == place else one for i, one in enumerate(operands)]
            return jnp.sum(jnp.sin(dense.product(*given, dimensions)))

        jaxpr = jax.make_jaxpr(jax.grad(loss))(operands[place])
        assert str(jaxpr).count("dot_general") == 3, jaxpr  # forward, and once per platform


def test_precision_argument_applies_to_gradients():
    x, kernel, dimensions = numbers(SHAPES["from heads"])
    for asked in (None, jax.lax.Precision.HIGHEST):

        def loss(x, kernel, asked=asked):
            return jnp.sum(jnp.sin(dense.product(x, kernel, dimensions, precision=asked)))

        text = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).as_text()
        assert text.count("dot_general") == 3
        assert text.count("HIGHEST, HIGHEST") == (3 if asked else 0)


@pytest.mark.parametrize("name", ["default", "high", "highest"])
def test_matmul_precision_context_applies_to_products_and_gradients(name):
    x, kernel, dimensions = numbers(SHAPES["from heads"])

    def loss(x, kernel):
        return jnp.sum(jnp.sin(dense.product(x, kernel, dimensions)))

    with dense.matmul_precision(name):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).as_text()
    assert text.count(f"[{name.upper()}, {name.upper()}]") == text.count("dot_general") == 3


def test_matmul_matches_numpy():
    x, kernel, _ = numbers(SHAPES["a width"])
    np.testing.assert_allclose(dense.matmul(x, kernel), np.asarray(x) @ kernel, rtol=1e-5)
