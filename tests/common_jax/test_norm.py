"""LayerNorm, compared with flax's: values, gradients and dtypes."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from common_jax.nn.norm import LayerNorm

EPSILON = 1e-2  # large enough to be missed


def draw(*shape):
    return np.random.default_rng(0).normal(1.0, 2.0, shape)


def pair(dtype, *, fast):
    ours = LayerNorm(EPSILON, dtype, fast_variance=fast)
    return ours, nn.LayerNorm(EPSILON, use_fast_variance=fast, dtype=dtype)


def params(dtype=jnp.float32):
    return {"params": {"scale": jnp.asarray(draw(6), dtype), "bias": jnp.asarray(draw(6), dtype)}}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 4, 6)])
def test_values_and_gradients_match_flax(shape, fast):
    weights = jnp.asarray(draw(*shape)[::-1])
    with jax.enable_x64():
        x, parts = jnp.asarray(draw(*shape)), params(jnp.float64)

        def loss(layer, parts, x):
            return jnp.sum(layer.apply(parts, x) * weights)

        ours, theirs = (
            jax.value_and_grad(lambda *a, layer=layer: loss(layer, *a), (0, 1))(parts, x)
            for layer in pair(jnp.float64, fast=fast)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-12), ours, theirs)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("given", [jnp.bfloat16, jnp.float32])
def test_dtypes_and_rounding_match_flax(given, dtype, fast):
    x, parts = jnp.asarray(draw(3, 6), given), params()
    for ours, theirs in zip(
        *(
            jax.tree.leaves(
                (
                    layer.apply(parts, x),
                    jax.grad(lambda *a, layer=layer: layer.apply(*a).sum(), (0, 1))(parts, x),
                )
            )
            for layer in pair(dtype, fast=fast)
        ),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype
        rounding = max(float(jnp.finfo(kind).eps) for kind in (given, dtype))
        np.testing.assert_allclose(
            ours.astype("float32"), theirs.astype("float32"), 4 * rounding, 8 * rounding
        )


def test_initial_parameters_match_flax():
    ours, theirs = (
        layer.init(jax.random.key(0), jnp.ones((2, 6))) for layer in pair(jnp.bfloat16, fast=False)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("fast", [False, True])
def test_constant_input_gives_the_bias_and_finite_gradients(fast):
    layer, _ = pair(jnp.float32, fast=fast)
    x = jnp.full((2, 6), 1e3 + 0.1, jnp.float32)
    np.testing.assert_allclose(layer.apply(params(), x), np.tile(draw(6), (2, 1)), atol=1e-2)
    gradient = jax.grad(lambda x: jnp.sum(layer.apply(params(), x) ** 2))(x)
    assert np.all(np.isfinite(gradient))
