"""Attention on CPUs, compared with jax's own, with all gradients."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from common_jax.nn import attention_cpu

B, T, S, H, K = 2, 3, 5, 2, 4


def draw():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, n, H, K))) for n in (T, S, S, T))


def masks():
    """Masks of every supported shape; in the last, one query attends to nothing."""
    rng = np.random.default_rng(1)
    full = rng.random((B, 1, T, S)) < 0.6
    full |= np.eye(T, S, dtype=bool)
    nothing = full.copy()
    nothing[1, 0, 2] = False
    keys = np.any(full, axis=2, keepdims=True) & (np.arange(S) != 2)
    return {"none": None, "full": full, "one": full[:1], "keys": keys, "nothing": nothing}


@pytest.mark.parametrize("name", masks())
def test_values_and_gradients_match_jax(name):
    with jax.enable_x64():
        query, keys, values, weights = draw()
        visible = masks()[name]
        visible = None if visible is None else jnp.asarray(visible)

        def plain(query, keys, values):
            return jax.nn.dot_product_attention(query, keys, values, mask=visible)

        def ours(query, keys, values):
            return attention_cpu.attend(query, keys, values, visible)

        found, wanted = (
            jax.value_and_grad(lambda *x, form=form: jnp.sum(form(*x) * weights), (0, 1, 2))(
                query, keys, values
            )
            for form in (ours, plain)
        )
        # jax computes the softmax in float32 for any input.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 2e-6), found, wanted)
        np.testing.assert_allclose(
            ours(query, keys, values), plain(query, keys, values), 1e-5, 1e-6
        )


def test_large_scores_stay_finite():
    query, keys, values, _ = (1e4 * x.astype("float32") for x in draw())
    found = attention_cpu.attend(query, keys, values)
    best = jnp.argmax(jnp.einsum("BTHK,BSHK->BHTS", query, keys), axis=-1)
    wanted = jnp.take_along_axis(values.swapaxes(1, 2), best[..., None], axis=2).swapaxes(1, 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", True), ("float64", True), ("bfloat16", False)]
)
def test_narrow_dtypes_are_left_to_jax(dtype, expected):
    assert attention_cpu.fits(jnp.dtype(dtype)) == expected


def test_remat_and_vmap_leave_gradients_unchanged():
    query, keys, values, weights = (x.astype("float32") for x in draw())

    def loss(attend, query, keys, values, weights):
        return jnp.sum(attend(query, keys, values) * weights)

    def gradient(attend):
        return jax.grad(loss, (1, 2, 3))(attend, query, keys, values, weights)

    wanted = gradient(attention_cpu.attend)
    found = gradient(jax.checkpoint(attention_cpu.attend))
    alone = [x[:, None] for x in (query, keys, values, weights)]
    each = jax.vmap(jax.grad(lambda *x: loss(attention_cpu.attend, *x), (0, 1, 2)))(*alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), found, wanted)
    for a, b in zip(each, wanted, strict=True):
        np.testing.assert_allclose(a[:, 0], b, 1e-5, 1e-6)
