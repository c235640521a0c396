"""The rank of a score among others, against values worked out by hand."""

import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from common_jax.checkpoint.manager import Best
from common_jax.ranking import rank_of

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ((3.0, 1.0, 2.0), (0, 2, 1)),
        ((5.0, 5.0, 5.0), (0, 1, 2)),  # ties: by index
        ((1.0, 7.0, 7.0), (2, 0, 1)),
        ((NAN, NAN, NAN), (3, 3, 3)),  # never a hit
        ((2.0, NAN, 1.0), (1, 3, 2)),  # NaN ranks before all numbers, but never counts as a hit
        ((2.0, INF, 1.0), (1, 3, 2)),
        ((-INF, -INF, 4.0), (3, 3, 0)),  # as when other examples' scores are masked
        ((0.0, -0.0, -1.0), (0, 1, 2)),
    ],
)
def test_ranks_match_top_k_with_non_finite_scores_last(scores, ranks):
    rows = jnp.tile(jnp.asarray(scores, jnp.float32), (3, 1))
    np.testing.assert_array_equal(rank_of(rows, jnp.arange(3)), ranks)


def test_finite_ranks_match_top_k_positions():
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 4, (50, 9)), jnp.float32)
    _, order = lax.top_k(scores, 9)
    for place in range(9):
        np.testing.assert_array_equal(rank_of(scores, order[:, place]), place)


def test_ranks_have_the_shape_of_the_targets():
    scores = jnp.asarray([[[1.0, 2.0], [4.0, 3.0]]])
    np.testing.assert_array_equal(rank_of(scores, jnp.asarray([[1, 1]])), [[0, 1]])


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ((0.5, NAN, 0.7), 2),
        ((NAN, 0.5, 0.2), 1),
        ((INF, 0.5, 0.5), 1),
        ((NAN, NAN), None),
        ((-INF,), None),
        ((), None),
    ],
)
def test_non_finite_metric_is_never_the_best(values, kept):
    found = Best(lambda value: value).should_preserve(list(values), context=None)
    assert found == [place == kept for place in range(len(values))]
