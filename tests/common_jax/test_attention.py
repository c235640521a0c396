"""Self-attention: its equation and initialisation."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from scipy.special import softmax
from tiny import fill

from common_jax.nn.attention import SelfAttention

B, T, HEADS, WIDTH = 3, 4, 2, 6


def attend(params, x, visible):
    """Head by head and token by token."""
    qkv, out = params["qkv"], params["out"]
    y = np.zeros(x.shape)
    for b, h, t in np.ndindex(B, HEADS, T):
        query, keys, values = (
            x[b] @ qkv["kernel"][:, i, h] + qkv.get("bias", np.zeros((3, HEADS, 1)))[i, h]
            for i in range(3)
        )
        scores = keys @ query[t] / np.sqrt(WIDTH // HEADS)
        weight = softmax(np.where(visible[b, 0, t], scores, -np.inf))
        y[b, t] += weight @ values @ out["kernel"][h]
    return y + out["bias"]


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_every_token_hears_those_that_are_visible(qkv_bias):
    layer, draw = SelfAttention(HEADS, qkv_bias, jnp.float32), np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(B, T, WIDTH)), jnp.float32)
    params = fill(partial(nn.Module.init, layer), x)  # `init` is a field of its own
    assert ("bias" in params["params"]["qkv"]) == qkv_bias
    params["params"]["qkv"] = jax.tree.map(lambda leaf: 5 * leaf, params["params"]["qkv"])
    everyone = np.ones((B, 1, T, T), bool)
    before = np.tril(everyone)
    holes = before & (np.arange(T) != np.array([1, 2, 3])[:, None])[:, None, None]
    holes |= np.eye(T, dtype=bool)
    for visible in (None, before, before[:1], holes):
        plain = jax.tree.map(np.float64, params["params"])
        heard = np.broadcast_to(everyone if visible is None else visible, everyone.shape)
        found = layer.apply(params, x, None if visible is None else jnp.asarray(visible))
        np.testing.assert_allclose(found, attend(plain, np.float64(x), heard), 1e-4, 1e-4)


def test_both_matrices_start_as_they_are_told_and_biases_at_zero():
    ones, twos = nn.initializers.constant(1.0), nn.initializers.constant(2.0)
    layer = SelfAttention(HEADS, True, jnp.float32, init=ones, out_init=twos)
    params = nn.Module.init(layer, jax.random.key(0), jnp.ones((1, T, WIDTH)))["params"]
    wanted = {"qkv": {"kernel": 1, "bias": 0}, "out": {"kernel": 2, "bias": 0}}
    for part, leaves in wanted.items():
        for name, value in leaves.items():
            np.testing.assert_array_equal(params[part][name], value)
