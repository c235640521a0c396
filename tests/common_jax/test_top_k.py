"""The k largest of long rows are those of `jax.lax.top_k`."""

import jax
import numpy as np

from common_jax.nn import top_k


def test_top_k_of_spans_matches_top_k(monkeypatch):
    """Including ties: scores are integers."""
    monkeypatch.setattr(top_k, "SPAN", 8)
    scores = np.random.default_rng(0).integers(0, 12, (3, 2, 500)).astype("float32")
    scores[0, 0, 5:] = -np.inf
    scores[0, 1] = 0
    found = jax.jit(lambda x: top_k.top_k(x, 20))(scores)
    jax.tree.map(np.testing.assert_array_equal, found, tuple(jax.lax.top_k(scores, 20)))
    text = str(jax.make_jaxpr(lambda x: top_k.top_k(x, 20))(scores))
    assert "f32[3,2,160]" in text  # 20 spans
