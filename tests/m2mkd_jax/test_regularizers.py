"""The regularisers against plain loops in float64, and the assignment against scipy's."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from m2mkd_jax import regularizers
from m2mkd_jax.assignment import assign_blocks
from m2mkd_jax.nac.kernel import KernelConfig
from m2mkd_jax.regularizers import (
    BlocksConfig,
    HingeConfig,
    MixtureConfig,
    RegularizersConfig,
    make_regularizer,
)

RNG = np.random.default_rng(0)
SIZES = {"input": 4, "mediator": 12, "output": 4}
SIGNATURES = {name: RNG.normal(size=(count, 6)).astype(np.float32) for name, count in SIZES.items()}
ALL = np.concatenate(list(SIGNATURES.values()))
BANDWIDTHS = (0.7, 1.3, 1.0)
KERNELS = (KernelConfig(),) * len(BANDWIDTHS)


def distances(signatures):
    unit = np.asarray(signatures, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return 1 - unit @ unit.T


def pairs(signatures):
    return [distances(signatures)[t, s] for t in range(len(signatures)) for s in range(t)]


def make_params(bandwidths=BANDWIDTHS):
    params = {"graph": {k: {"signatures": jnp.asarray(v)} for k, v in SIGNATURES.items()}}
    for layer, bandwidth in enumerate(bandwidths):
        params[f"stage_{layer + 1}"] = {"attention": {"bandwidth": jnp.float32(bandwidth)}}
    # The read-in has no kernel, and the read-out's kernel does not count.
    last = {f"stage_{len(KERNELS) + 1}": {"attention": {"bandwidth": jnp.float32(99)}}}
    return params | {"stage_0": {"attention": {}}} | last


def links_of(signatures, bandwidths=BANDWIDTHS, truncation=0.9):
    d = distances(signatures)
    return np.stack([np.where(d <= truncation, np.exp(-d / b), 0) for b in bandwidths])


def naive_block_loss(links, clusters, within, between, clip=0.0):
    """Rows permuted by scipy, one line per latent."""
    block = np.arange(links.shape[-1]) // (links.shape[-1] // clusters)
    graphon = np.where(block[:, None] == block, within, between)
    total = 0.0
    for link in links:
        cost = ((graphon[:, None] - link[None]) ** 2).mean(-1)
        _, rows = linear_sum_assignment(cost)
        total += np.maximum((link[rows] - graphon) ** 2, clip).mean()
    return total


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_hinge_repulsion(reduction):
    near = [d for d in pairs(ALL) if d < 0.6]
    want = -sum(near) / (len(near) if reduction == "mean" else 1)
    got = regularizers.hinge_repulsion(jnp.asarray(ALL), hinge=0.6, reduction=reduction)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_hinge_without_near_pairs_is_0(reduction):
    far = jnp.eye(5)
    value, gradient = jax.value_and_grad(regularizers.hinge_repulsion)(
        far, hinge=0.4, reduction=reduction
    )
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_descending_the_hinge_pushes_near_latents_apart():
    near = jnp.asarray([[1.0, 0.1], [1.0, -0.1]])
    gradient = jax.grad(regularizers.hinge_repulsion)(near, hinge=0.4)
    assert distances(near - 0.1 * gradient)[0, 1] > distances(near)[0, 1]


def test_identical_latents_give_finite_gradients():
    alike = jnp.ones((4, 3))
    assert np.isfinite(jax.grad(regularizers.hinge_repulsion)(alike, hinge=0.4)).all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_mixture_loss(reduction):
    mixture = regularizers.fit_mixture(jnp.asarray(ALL), components=3)
    assert mixture.weights.sum() == pytest.approx(1, abs=1e-6)
    parts = list(zip(mixture.weights, mixture.means, mixture.sigmas, strict=True))
    terms = [
        -math.log(
            sum(
                w * math.exp(-((d - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi))
                for w, m, s in np.asarray(parts, np.float64)
            )
        )
        for d in pairs(ALL)
    ]
    want = sum(terms) / (len(terms) if reduction == "mean" else 1)
    got = regularizers.mixture_loss(jnp.asarray(ALL), mixture, reduction=reduction)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_one_component_mixture_is_normal_fit_to_distances():
    mixture = regularizers.fit_mixture(jnp.asarray(ALL), components=1)
    np.testing.assert_allclose(mixture.means[0], np.mean(pairs(ALL)), rtol=1e-5)
    np.testing.assert_allclose(mixture.sigmas[0], np.std(pairs(ALL)), rtol=1e-4)


def test_mixture_of_collapsed_latents_is_fitted():
    # Communities of equal latents, as from a fit to a dense planted partition, so that components
    # have zero variance.
    collapsed = jnp.repeat(jnp.eye(4) + 0.1, 50, axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are fewer distinct distances than components
        mixture = regularizers.fit_mixture(collapsed, components=3)
    assert (mixture.sigmas > 0).all()
    assert np.isfinite(regularizers.mixture_loss(collapsed, mixture))


def test_mixture_needs_pairs():
    with pytest.raises(ValueError, match=r"^config\.regularizers\.mixture\.components=3.* 1 pairs"):
        regularizers.fit_mixture(jnp.eye(2), components=3)


@pytest.mark.parametrize(("clusters", "clip"), [(1, None), (5, None), (5, 0.05), (20, None)])
def test_block_loss(clusters, clip):
    links = links_of(ALL)
    got = regularizers.block_loss(
        jnp.asarray(links, jnp.float32), clusters=clusters, within=0.8, between=0.1, clip=clip
    )
    want = naive_block_loss(links, clusters, 0.8, 0.1, clip or 0.0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("shape", [(24, 8), (40, 2), (7, 7), (6, 1)])
def test_assignment_matches_scipy(shape):
    rng = np.random.default_rng(shape[0])
    rows, blocks = shape
    # With a skew, all rows prefer the same blocks.
    skew = np.repeat((0, 3), 20)[:, None, None]
    cost = (rng.random((40, *shape)) + skew * rng.random((40, 1, blocks))).astype(np.float32)
    assigned = np.asarray(jax.jit(assign_blocks)(cost))
    for got, costs in zip(assigned, cost.astype(np.float64), strict=True):
        np.testing.assert_array_equal(np.bincount(got, minlength=blocks), rows // blocks)
        chosen = linear_sum_assignment(np.repeat(costs, rows // blocks, axis=1))
        best = np.repeat(costs, rows // blocks, axis=1)[chosen].sum()
        assert costs[np.arange(rows), got].sum() == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("cost", [np.zeros((8, 4)), np.full((8, 4), np.nan)])
def test_assignment_terminates_for_any_costs(cost):
    assigned = np.asarray(assign_blocks(jnp.asarray(cost, jnp.float32)))
    assert set(assigned) <= set(range(4))
    if np.isfinite(cost).all():
        np.testing.assert_array_equal(np.bincount(assigned), 2)


def test_clusters_must_divide_the_latents():
    config = RegularizersConfig(blocks=BlocksConfig(weight=1.0, clusters=5))
    with pytest.raises(ValueError, match=r"blocks\.clusters=5 must divide the 12 latents"):
        make_regularizer(config, SIGNATURES, kernels=KERNELS)


def test_blocks_need_a_kernel_in_every_iteration():
    config = RegularizersConfig(blocks=BlocksConfig(weight=1.0, clusters=4))
    said = r"layerwise\.kernel leaves iteration 1 without a kernel, .* config\.regularizers\.blocks"
    with pytest.raises(ValueError, match=said):
        make_regularizer(config, SIGNATURES, kernels=(KERNELS[0], None))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HingeConfig(reduction="max"), r"^reduction='max'"),
        (lambda: HingeConfig(hinge=0.0), r"^hinge=0.0"),
        (lambda: MixtureConfig(components=0), r"^components=0"),
        (lambda: BlocksConfig(latents="input"), r"^latents='input'"),
        (lambda: BlocksConfig(clusters=0), r"^clusters=0"),
    ],
)
def test_invalid_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_weight_moves_linearly():
    assert regularizers.weight_at(0.3, None, 0.7) == 0.3
    assert regularizers.weight_at(0.02, 0.5, 3 / 8) == pytest.approx(0.2)
    assert [regularizers.weight_at(1.0, 0.0, p) for p in (0.0, 0.5, 1.0)] == [1, 0.5, 0]


def test_zero_weights_compute_nothing():
    total, metrics = make_regularizer(RegularizersConfig(), SIGNATURES, kernels=KERNELS)(
        make_params(), 0.5
    )
    assert total == 0 and metrics == {}


def test_terms_are_weighted_and_reported():
    config = RegularizersConfig(
        hinge=HingeConfig(weight=0.1, hinge=0.6),
        mixture=MixtureConfig(weight=0.0, weight_end=2.0),
        blocks=BlocksConfig(weight=3.0, clusters=4),
    )
    total, metrics = make_regularizer(config, SIGNATURES, kernels=KERNELS)(make_params(), 0.25)
    names = ("hinge", "mixture", "blocks")
    hinge, mixture, blocks = (metrics[f"regularizer/{name}"] for name in names)
    np.testing.assert_allclose(hinge, -sum(d for d in pairs(ALL) if d < 0.6), rtol=1e-5)
    want = naive_block_loss(links_of(SIGNATURES["mediator"]), 4, 0.9, 0.2)
    np.testing.assert_allclose(blocks, want, rtol=1e-5)
    np.testing.assert_allclose(total, 0.1 * hinge + 0.5 * mixture + 3 * blocks, rtol=1e-6)


@pytest.mark.parametrize("latents", ["mediator", "all"])
def test_shared_propagators_count_once_per_iteration(latents):
    config = RegularizersConfig(blocks=BlocksConfig(weight=1.0, clusters=4, latents=latents))
    regularizer = make_regularizer(config, SIGNATURES, kernels=KERNELS)
    signatures = ALL if latents == "all" else SIGNATURES["mediator"]
    want = naive_block_loss(links_of(signatures, (0.7,) * 3), 4, 0.9, 0.2)
    np.testing.assert_allclose(regularizer(make_params((0.7,)), 0.0)[0], want, rtol=1e-5)


def test_each_iteration_has_its_own_kernel():
    kernels = tuple(
        KernelConfig(truncation=t, bandwidth=b)
        for t, b in zip((0.5, 1.1, 0.9), BANDWIDTHS, strict=True)
    )
    params = make_params()
    for layer in range(len(kernels)):  # not learned, so that the config's bandwidths count
        params[f"stage_{layer + 1}"] = {"attention": {}}
    config = RegularizersConfig(blocks=BlocksConfig(weight=1.0, clusters=4))
    got, _ = make_regularizer(config, SIGNATURES, kernels=kernels)(params, 0.0)
    one = [(b,) for b in BANDWIDTHS]
    links = [
        links_of(SIGNATURES["mediator"], b, kernel.truncation)
        for b, kernel in zip(one, kernels, strict=True)
    ]
    np.testing.assert_allclose(got, naive_block_loss(np.concatenate(links), 4, 0.9, 0.2), rtol=1e-5)


def test_sharded_gradients_match():
    config = RegularizersConfig(
        hinge=HingeConfig(weight=0.1, hinge=0.6),
        mixture=MixtureConfig(weight=1.0),
        blocks=BlocksConfig(weight=1.0, clusters=4, latents="all"),
    )
    regularizer = make_regularizer(config, SIGNATURES, kernels=KERNELS)
    compute = jax.value_and_grad(regularizer, has_aux=True)
    params = make_params()
    want = jax.jit(compute)(params, 0.5)
    mesh = jax.make_mesh((8,), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    got = jax.jit(compute, out_shardings=whole)(jax.device_put(params, whole), 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)
    gradients = want[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.abs(gradients["graph"]["input"]["signatures"]).max() > 0
    assert gradients["stage_1"]["attention"]["bandwidth"] != 0
    assert gradients["stage_4"]["attention"]["bandwidth"] == 0


# Values by hand.


def test_the_defaults_are_the_published_ones():
    assert RegularizersConfig() == RegularizersConfig(
        hinge=HingeConfig(weight=0.0, weight_end=None, hinge=0.4, reduction="sum"),
        mixture=MixtureConfig(weight=0.0, weight_end=None, components=3, reduction="mean"),
        blocks=BlocksConfig(
            weight=0.0,
            weight_end=None,
            clusters=8,
            within=0.9,
            between=0.2,
            latents="mediator",
            clip=None,
        ),
    )


# Their distances: 1 between the first two; 1 - 3/5 and 1 - 4/5 from the third to these.
THREE = jnp.asarray([[2.0, 0.0], [0.0, 1.0], [0.3, 0.4]])


@pytest.mark.parametrize(
    ("hinge", "total", "count"), [(1.0, -0.6, 2), (0.3, -0.2, 1), (0.1, 0.0, 1), (2.0, -1.6, 3)]
)
def test_hinge_by_hand(hinge, total, count):
    for reduction, want in (("sum", total), ("mean", total / count)):
        found = regularizers.hinge_repulsion(THREE, hinge=hinge, reduction=reduction)
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_mixture_by_hand():
    # Half a Gaussian around 1, half around 0; the distance is 1.
    halves = regularizers.Mixture(np.full(2, 0.5), np.array([1.0, 0.0]), np.array([0.5, 0.25]))
    near = 0.5 / (0.5 * math.sqrt(2 * math.pi))
    far = 0.5 * math.exp(-8) / (0.25 * math.sqrt(2 * math.pi))
    found = regularizers.mixture_loss(THREE[:2], halves)
    np.testing.assert_allclose(found, -math.log(near + far), rtol=1e-5)


def test_block_loss_by_hand():
    # The best rows: the second for the first block, the first for the second.
    links = jnp.asarray([[[0.25, 1.0], [0.5, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    settings = {"clusters": 2, "within": 1.0, "between": 0.0}
    loss = lambda links, clip: regularizers.block_loss(links, clip=clip, **settings)  # noqa: E731
    np.testing.assert_allclose(loss(links, None), (0.0625 + 0.25) / 4, rtol=1e-6)
    np.testing.assert_allclose(loss(links, 0.125), (3 * 0.125 + 0.25) / 4 + 0.125, rtol=1e-6)
    gradient = jax.grad(loss)(links, 0.125)
    want = np.zeros((2, 2, 2))
    want[0, 1, 0] = 2 * -0.5 / 4  # all others are clipped
    np.testing.assert_allclose(gradient, want, atol=1e-7)


def test_every_setting_reaches_its_term():
    config = RegularizersConfig(
        hinge=HingeConfig(weight=0.0, weight_end=0.5, hinge=0.7, reduction="mean"),
        mixture=MixtureConfig(weight=2.0, weight_end=0.0, components=1, reduction="sum"),
        blocks=BlocksConfig(
            weight=3.0, clusters=5, within=0.7, between=0.1, latents="all", clip=0.02
        ),
    )
    total, metrics = make_regularizer(config, SIGNATURES, kernels=KERNELS)(make_params(), 0.25)
    hinge, mixture, blocks = (
        metrics[f"regularizer/{name}"] for name in ("hinge", "mixture", "blocks")
    )
    found = np.array(pairs(ALL))
    np.testing.assert_allclose(hinge, -found[found < 0.7].mean(), rtol=1e-5)
    variance = found.var()
    likelihoods = -0.5 * (found - found.mean()) ** 2 / variance
    likelihoods -= 0.5 * math.log(2 * math.pi * variance)
    np.testing.assert_allclose(mixture, -likelihoods.sum(), rtol=1e-3)
    want = naive_block_loss(links_of(ALL), 5, 0.7, 0.1, 0.02)
    np.testing.assert_allclose(blocks, want, rtol=1e-5)
    np.testing.assert_allclose(total, 0.125 * hinge + 1.5 * mixture + 3 * blocks, rtol=1e-5)


def test_mixture_is_fitted_to_initial_signatures():
    config = RegularizersConfig(mixture=MixtureConfig(weight=1.0, components=1))
    regularizer = make_regularizer(config, SIGNATURES, kernels=KERNELS)
    mixture = regularizers.fit_mixture(jnp.asarray(ALL), components=1)
    params = make_params()
    params["graph"]["mediator"]["signatures"] += 1.0
    moved = np.concatenate([params["graph"][name]["signatures"] for name in SIZES])
    want = regularizers.mixture_loss(jnp.asarray(moved), mixture)
    np.testing.assert_allclose(regularizer(params, 0.0)[0], want, rtol=1e-5)


def test_bandwidths_are_in_order_of_iterations():
    bandwidths = tuple(float(i) for i in range(1, 13))
    params = {f"stage_{i}": {"attention": {"bandwidth": b}} for i, b in enumerate(bandwidths, 1)}
    params |= {"graph": {}, "stage_0": {"attention": {}}, "stage_13": {"attention": {}}}
    kernels = (KernelConfig(bandwidth=7.0),) * 12
    assert tuple(regularizers.find_bandwidths(params, kernels)) == bandwidths
    del params["stage_2"]["attention"]["bandwidth"]
    assert regularizers.find_bandwidths(params, kernels)[1] == 7.0
