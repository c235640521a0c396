"""Layer normalisation, and what it and the activations keep for the backward pass."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from tiny import fill

from common_jax.nn.mlp import ACTIVATIONS
from common_jax.nn.norm import layer_norm


def _input() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(2, 3, (3, 5, 16)), jnp.bfloat16)


@pytest.mark.parametrize("fast", [False, True])
def test_a_norm_and_its_gradients_are_flax_s(fast):
    x = _input()
    plain = nn.LayerNorm(1e-2, use_fast_variance=fast, dtype=jnp.bfloat16)
    ours = layer_norm(1e-2, jnp.bfloat16, fast_variance=fast)
    params = fill(plain.init, x)

    def total(params, x, norm):
        return jnp.sum(jnp.sin(norm.apply(params, x).astype(jnp.float32)))

    wanted, found = (jax.grad(total, (0, 1))(params, x, norm) for norm in (plain, ours))
    jax.tree.map(np.testing.assert_array_equal, ours.apply(params, x), plain.apply(params, x))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_norm_keeps_its_input_and_its_gain():
    x = _input()
    norm = layer_norm(1e-2, jnp.bfloat16)
    params = fill(norm.init, x)
    assert _kept(norm.apply, params, x) == x.nbytes + params["params"]["scale"].nbytes


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_keeps_its_input_alone(name):
    assert _kept(ACTIVATIONS[name], _input()) == _input().nbytes


def _kept(function, *arguments) -> int:
    """Bytes of the arrays that the backward pass of `function` reads."""
    _, backward = jax.vjp(function, *arguments)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
