"""NAC's kernels, worked out by hand: distances, truncation, gradients, samples."""

import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from m2mkd_jax.nac import kernel
from m2mkd_jax.nac.kernel import KernelConfig

INF = math.inf


def test_the_defaults_are_the_published_ones():
    assert KernelConfig() == KernelConfig(
        truncation=0.9,
        truncation_kind="direct",
        straight_through=True,
        stochastic=True,
        temperature=0.5,
        evaluation="kernel",
        bandwidth=1.0,
        learnable_bandwidth=True,
        empty_row="zero",
    )


def test_distances_by_hand():
    receivers, senders = [[2.0, 0.0], [0.0, 0.5]], [[1.0, 0.0], [0.0, 3.0], [-4.0, 0.0], [1.0, 1.0]]
    found = kernel.cosine_distance(jnp.array(receivers), jnp.array(senders))
    oblique = 1 - math.sqrt(0.5)
    np.testing.assert_allclose(found, [[0, 1, 2, oblique], [1, 0, 1, oblique]], atol=1e-6)


def test_distances_are_at_least_float32():
    signatures = jnp.array([[1.0, 0.25], [1.0, 0.5]], jnp.bfloat16)
    found = kernel.cosine_distance(signatures, signatures)
    assert found.dtype == jnp.float32
    want = 1 - 1.125 / math.sqrt(1.0625 * 1.25)
    np.testing.assert_allclose(found[0, 1], want, rtol=1e-4)


# Distances of 1/4, 3/4 and 1, with a truncation of 3/4.
DISTANCE = jnp.array([[0.25, 0.75, 1.0]])


def of(kind: str, straight: bool = True) -> KernelConfig:
    return KernelConfig(truncation=0.75, truncation_kind=kind, straight_through=straight)


@pytest.mark.parametrize(
    ("config", "bandwidth", "want"),
    [
        (of("direct"), 0.5, [-0.5, -1.5, -INF]),
        (of("direct", False), 0.5, [-0.5, -1.5, -INF]),
        (of("masked"), 0.5, [-0.5, -INF, -INF]),
        (KernelConfig(truncation=None), 0.5, [-0.5, -1.5, -2.0]),
        # A negative bandwidth reverses the order if it is compared after the division.
        (of("direct"), -0.5, [-INF, 1.5, 2.0]),
        (of("masked"), -0.5, [0.5, -INF, -INF]),
    ],
)
def test_kernels_by_hand(config, bandwidth, want):
    bandwidth = jnp.float32(bandwidth)
    np.testing.assert_allclose(kernel.log_kernel(DISTANCE, bandwidth, config)[0], want, rtol=1e-6)
    exponential = kernel.exp_kernel(DISTANCE, bandwidth, config)[0]
    np.testing.assert_allclose(exponential, np.exp(want), rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "config", "want"),
    [
        # -1 / beta for an existing edge; with straight_through, for a cut one too.
        ("log", of("direct"), [-2, -2, -2]),
        ("log", of("direct", False), [-2, -2, 0]),
        ("exp", of("masked"), [-2 * math.exp(-0.5), -2 * math.exp(-1.5), -2 * math.exp(-2)]),
        ("exp", of("masked", False), [-2 * math.exp(-0.5), 0, 0]),
        ("exp", of("direct"), [-2 * math.exp(-0.5), -2 * math.exp(-1.5), 0]),
    ],
)
def test_gradients_by_hand(form, config, want):
    function = {"log": kernel.log_kernel, "exp": kernel.exp_kernel}[form]
    _, pullback = jax.vjp(lambda d, b: function(d, b, config), DISTANCE, jnp.float32(0.5))
    by_distance, by_bandwidth = pullback(jnp.ones((1, 3)))
    np.testing.assert_allclose(by_distance[0], want, rtol=1e-5)
    # The derivative with respect to the bandwidth is -d / beta times the one for the distance.
    along = -np.asarray(DISTANCE[0]) / 0.5
    np.testing.assert_allclose(by_bandwidth, np.sum(along * np.array(want)), rtol=1e-5)


# Samples.


@pytest.mark.parametrize(
    ("p", "u", "temperature", "want"),
    [
        (0.9, 0.5, 1.0, 0.9),
        (0.9, 0.5, 0.5, 0.81 / 0.82),
        (0.9, 0.5, 0.25, 0.6561 / 0.6562),
        (0.5, 0.8, 1.0, 0.8),
        (0.5, 0.8, 0.5, 16 / 17),
        (0.2, 0.5, 0.5, 1 / 17),
        (0.2, 0.8, 0.5, 0.5),
        (0.2, 0.8, 1.0, 0.5),
        (0.2, 0.5, 2.0, 1 / 3),
    ],
)
def test_samples_by_hand(p, u, temperature, want):
    found = kernel.sample_log(jnp.log(p)[None, None], jnp.full((1, 1), u), temperature=temperature)
    np.testing.assert_allclose(np.exp(found), want, rtol=1e-5)


def test_samples_stay_within_float32():
    logs, uniform = jnp.array([[-INF, 0.0]]), jnp.array([[0.0, 1.0]])
    found = kernel.sample_log(logs, uniform, temperature=0.1)[0]
    np.testing.assert_allclose(found, [-126 * math.log(2), -(2.0**-23)], rtol=1e-4)


def test_extreme_uniform_numbers_are_clipped_by_epsilon():
    logs, uniform = jnp.array([[0.0, jnp.log(0.5), -INF]]), jnp.array([[0.0, 0.0, 1.0]])
    found = kernel.sample_log(logs, uniform, temperature=0.5)[0]
    # For the first and the last, the two extremes cancel.
    np.testing.assert_allclose(found, [-math.log(2), -46 * math.log(2), -math.log(2)], rtol=1e-4)


def test_truncated_edge_is_unlikely_but_possible():
    found = kernel.sample_log(jnp.full((1, 1), -INF), jnp.full((1, 1), 0.5), temperature=0.5)
    np.testing.assert_allclose(found, [[-2 * 23 * math.log(2)]], rtol=1e-4)


def test_gradients_of_samples_by_hand():
    logs, uniform = jnp.array([[jnp.log(0.9), 0.0, -INF]]), jnp.full((1, 3), 0.5)
    _, pullback = jax.vjp(lambda x: kernel.sample_log(x, uniform, temperature=0.5), logs)
    (found,) = pullback(jnp.ones((1, 3)))
    # (1 - y) / (temperature (1 - p)); zero for an edge that is certain, or cut.
    np.testing.assert_allclose(found[0], [(0.01 / 0.82) / (0.5 * 0.1), 0, 0], rtol=1e-3)


def test_threshold_keeps_an_affinity_of_one_half():
    logs = jnp.array([[jnp.log(0.49), jnp.log(0.5), 0.0, -INF]])
    np.testing.assert_array_equal(kernel.threshold_log(logs)[0], [-INF, 0, 0, -INF])


# Rows.

ROWS = jnp.array([[jnp.log(0.1), jnp.log(0.3)], [-INF, jnp.log(0.2)], [-INF, -INF]])


@pytest.mark.parametrize("empty_row", ["zero", "nan"])
def test_rows_by_hand(empty_row):
    empty = [0, 0] if empty_row == "zero" else [np.nan, np.nan]
    want = [[0.25, 0.75], [0, 1], empty]
    logs = kernel.normalise_log_rows(ROWS, empty_row=empty_row)
    np.testing.assert_allclose(np.exp(logs), want, rtol=1e-5)
    rows = kernel.normalise_rows(jnp.exp(ROWS), empty_row=empty_row)
    np.testing.assert_allclose(rows, want, rtol=1e-5)


def test_a_row_is_empty_when_all_its_edges_are_cut():
    np.testing.assert_array_equal(kernel.is_empty(ROWS), [[False], [False], [True]])
