"""NAC's products that have special forms for CPUs, against jax's own."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from m2mkd_jax.nac.products import Depthwise, scale_by


def normal(seed, *shape, dtype="float64"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_same(found, wanted, arguments, dy):
    """Compares two functions and their gradients."""
    with jax.enable_x64(True):
        results = [jax.vjp(jax.jit(function), *arguments) for function in (found, wanted)]
        outputs = [(y, *vjp(jnp.asarray(dy, y.dtype))) for y, vjp in results]
        for ours, theirs in zip(*outputs, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((2, 3, 4, 5), (4, 5)), ((3, 4, 5), (4, 5)), ((3, 4, 5), (1, 5)), ((4, 5),) * 2],
)
def test_scale_by_matches_multiply(shape, scales):
    assert_same(scale_by, jnp.multiply, (normal(0, *shape), normal(1, *scales)), normal(2, *shape))


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (2, 3), (1, 1)])
@pytest.mark.parametrize("side", [1, 3, 7])
def test_depthwise_matches_lax_convolution(rows, columns, side):
    x, kernel, bias = normal(0, 2, rows, columns, 6), normal(1, side, side, 1, 6), normal(2, 6)

    def ours(x, kernel, bias):
        params = {"params": {"kernel": kernel, "bias": bias}}
        return Depthwise(side, jnp.float64).apply(params, x)

    def wanted(x, kernel, bias):
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=6,
        )
        return y + bias

    assert_same(ours, wanted, (x, kernel, bias), normal(3, *x.shape))


@pytest.mark.parametrize(("dtype", "chooses"), [("float32", True), ("bfloat16", False)])
def test_bfloat16_products_are_left_to_xla(dtype, chooses):
    x, scales = jnp.ones((3, 4, 5), dtype), jnp.ones((4, 5), dtype)
    convolve = Depthwise(3, jnp.dtype(dtype))
    params = convolve.init(jax.random.key(0), x[None])
    for program in (
        jax.make_jaxpr(scale_by)(x, scales),
        jax.make_jaxpr(convolve.apply)(params, x[None]),
    ):
        assert ("platform_index" in str(program)) == chooses
        assert [value.dtype for value in program.out_avals] == [dtype]
