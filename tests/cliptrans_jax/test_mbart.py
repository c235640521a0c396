"""mBART alone: its initialisation and its tied embedding."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tiny_cliptrans import UNEVEN

from cliptrans_jax.translators.mbart import MBart
from cliptrans_jax.translators.transformer import Decoder

PAD = UNEVEN.pad


def test_mbart_has_the_published_initialisation():
    """Matrices and tables are normal with deviation 0.02, biases 0 and gains 1."""
    ids, x, visible = jnp.asarray([[5, 6]]), jnp.zeros((1, 2, 16)), jnp.ones((1, 1, 1, 2), bool)
    network, decoder = MBart(UNEVEN, jnp.float32), Decoder(UNEVEN, jnp.float32)

    def init(key):
        mbart = network.init(key, ids, method=MBart.embed)["params"]
        return mbart, decoder.init(key, x, x, visible[:, :, [0, 0]], visible, False)["params"]

    key = jax.random.key(0, impl="rbg")  # quick to compile
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(init)(key)):
        name = path[-1].key
        if name in ("bias", "logits_bias", "scale"):
            assert np.all(np.asarray(leaf) == float(name == "scale")), path
        else:
            assert abs(np.std(leaf) / 0.02 - 1) < 0.2 and abs(np.mean(leaf)) < 0.005, path


@pytest.mark.parametrize(("scaled", "factor"), [(True, 4), (False, 1)])
def test_pad_embedding_has_no_gradient(scaled, factor):
    network = MBart(dataclasses.replace(UNEVEN, scale_embedding=scaled), jnp.float32)
    params = {"embedding": jnp.ones((40, 16)), "logits_bias": jnp.zeros(40)}
    ids, weights = (
        jnp.asarray([[5, PAD, 5, 7]]),
        np.random.default_rng(2).normal(size=(1, 4, 16)),
    )

    def total(embedding, weights, method, x):
        found = network.apply({"params": params | {"embedding": embedding}}, x, method=method)
        return jnp.sum(found * weights)

    slope = jax.grad(total)(params["embedding"], weights, MBart.embed, ids)
    wanted = np.zeros((40, 16))
    wanted[5], wanted[7] = factor * (weights[0, 0] + weights[0, 2]), factor * weights[0, 3]
    np.testing.assert_allclose(slope, wanted, rtol=1e-5)
    # As an output, a pad is learnt like any other token.
    hidden = jnp.asarray(weights[0], jnp.float32)
    slope = jax.grad(total)(params["embedding"], 1.0, MBart.logits, hidden)
    np.testing.assert_allclose(slope, np.tile(weights[0].sum(axis=0), (40, 1)), rtol=1e-4)


def test_bfloat16_logits_are_kept_in_float32():
    """In bfloat16, 16.0625 would be 16."""
    params = {"embedding": jnp.ones((40, 16)), "logits_bias": jnp.zeros(40)}
    hidden = jnp.asarray([[16.0, 0.0625, *[0.0] * 14]], jnp.bfloat16)
    network = MBart(UNEVEN, jnp.bfloat16)
    found = network.apply({"params": params}, hidden, method=MBart.logits)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 16.0625)


def test_gradient_of_a_frequent_token_is_exact_in_bfloat16():
    """A sum in bfloat16 would stop at 256, where adding 1 no longer changes it."""
    network = MBart(dataclasses.replace(UNEVEN, scale_embedding=False), jnp.bfloat16)
    ids = jnp.full((64, 16), 5)

    def total(table):
        params = {"embedding": table, "logits_bias": jnp.zeros(UNEVEN.vocab)}
        embeddings = network.apply({"params": params}, ids, method=MBart.embed)
        return jnp.sum(embeddings.astype(jnp.float32))

    gradient = jax.grad(total)(jnp.ones((UNEVEN.vocab, UNEVEN.width)))
    np.testing.assert_array_equal(gradient[5], 64 * 16)
