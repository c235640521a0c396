"""The decoder's attention over cached keys and values."""

import naive_cliptrans as naive
import numpy as np
import pytest
from jax import numpy as jnp

from cliptrans_jax.models import attention
from cliptrans_jax.translators.translator import grow_cache


def test_cached_attention_matches_the_formula():
    draw = np.random.default_rng(4)
    query, keys, values = (draw.normal(size=(2, length, 6)) for length in (3, 5, 5))
    visible = draw.random((2, 1, 3, 5)) < 0.6
    visible[..., 0] = True
    split = [jnp.asarray(x.reshape(2, -1, 2, 3), "f4") for x in (query, keys, values)]
    memory = tuple(x.swapaxes(1, 2) for x in split[1:])
    for mask in (visible, visible[:, :, :1]):  # a mask per query, or one for all
        found = attention.attend(split[0], memory, jnp.asarray(mask))
        for row in range(2):
            wanted = naive.attend(query[row], keys[row], values[row], mask[row, 0], heads=2)
            np.testing.assert_allclose(found[row].reshape(3, 6), wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_scores_are_kept_in_float32():
    # 49.88 and 50.10, which are both 50 in bfloat16.
    query, keys = 7.0625, np.array([7.0625, 7.09375])
    parts = [jnp.asarray(x, jnp.bfloat16) for x in ([[[[query]]]], [[keys[:, None]]])]
    values = jnp.asarray([[[[0.0], [1.0]]]], jnp.bfloat16)
    found = attention.attend(parts[0], (parts[1], values), jnp.ones((1, 1, 1, 2), bool))
    wanted = 1 / (1 + np.exp(query * (keys[0] - keys[1])))
    assert float(found[0, 0, 0, 0]) == pytest.approx(wanted, rel=0.01)


def test_cache_grows_at_its_end():
    kept, states = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 6, 4))
    grown, same = grow_cache((((kept, kept), (states, states)),), 5)[0]
    assert all(part is states for part in same)
    for part in grown:
        assert part.shape == (1, 2, 5, 4)
        assert np.all(np.asarray(part[:, :, :3]) == 1) and not np.any(np.asarray(part[:, :, 3:]))
