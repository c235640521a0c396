"""The beta-distribution sampler that takes a fixed number of steps."""

import jax
import numpy as np
import pytest

from common_jax.nn.beta import beta

KEYS = jax.random.split(jax.random.key(5), 2000)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.5])
def test_samples_match_jax(alpha):
    found = jax.jit(jax.vmap(lambda key: beta(key, alpha)))(KEYS)
    want = jax.jit(jax.vmap(lambda key: jax.random.beta(key, alpha, alpha)))(KEYS)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    assert np.ptp(found) > 0.8  # not all equal


def test_loops_have_known_trip_counts():
    text = jax.jit(lambda key: beta(key, 0.8)).lower(KEYS[0]).compile().as_text()
    loops = [line for line in text.splitlines() if " while(" in line]
    assert loops and all("known_trip_count" in line for line in loops)
