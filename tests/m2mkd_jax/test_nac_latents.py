"""NAC's latents, their initial states, and the pooling of the last states: values by hand,
initialisation, what is drawn."""

import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tiny import fill

from m2mkd_jax.nac.latents import (
    Graph,
    GraphConfig,
    LatentConfig,
    Latents,
    LatentSet,
    Seeder,
)
from m2mkd_jax.nac.layers import NOISE
from m2mkd_jax.nac.pooling import ConfidencePooling

WIDTH, SIGNATURE, CODE, BATCH = 6, 4, 5, 3
SETS = ("input", "mediator", "output")


def graph_config(count: int = 2, layers: int | None = None, **changes) -> GraphConfig:
    """Equally many latents in each set, so that only their names tell the sets apart."""
    latents = {name: LatentConfig(count) for name in SETS}
    latents["mediator"] = LatentConfig(count, layers=layers)
    sizes = {"width": WIDTH, "signature_width": SIGNATURE, "code_width": CODE}
    return GraphConfig(**(latents | sizes | changes))


def make(**changes):
    graph = Graph(graph_config(**changes), jnp.float32)
    return graph, fill(lambda key: graph.init(key, BATCH))


def keys(**seeds: int) -> dict[str, jax.Array]:
    return {name: jax.random.key(seed, impl="rbg") for name, seed in seeds.items()}


# Initialisation of latents.


def draw_set(seed: int = 0, seeding: str = "noise", **changes):
    latents = LatentSet(LatentConfig(200, **changes), graph_config(seeding=seeding))
    return jax.jit(latents.init)(jax.random.key(seed, impl="rbg"))["params"]


def test_latents_start_standard_normal():
    params = draw_set(layers=3, seeding="learned")
    shapes = {name: array.shape for name, array in params.items()}
    assert shapes == {
        "signatures": (200, SIGNATURE),
        "codes": (3, 200, CODE),
        "states": (200, WIDTH),
    }
    for array in params.values():
        assert np.std(array) == pytest.approx(1, abs=0.1)
        assert abs(np.mean(array)) < 0.15
        assert np.abs(array).max() > 2.2
    assert not np.any(np.asarray(params["codes"][0] == params["codes"][1]))


@pytest.mark.parametrize("layers", [None, 2])
def test_identical_codes_are_one_draw(layers):
    codes = np.asarray(draw_set(identical_codes=True, layers=layers)["codes"])
    first = codes.reshape(-1, CODE)[0]
    np.testing.assert_array_equal(codes, np.broadcast_to(first, codes.shape))
    assert len(set(first.tolist())) == CODE and np.std(first) > 0.1
    other = draw_set(1, identical_codes=True, layers=layers)["codes"]
    assert not np.any(np.asarray(other == codes))


def test_identical_signatures_are_the_first_unit_vector():
    signatures = draw_set(identical_signatures=True)["signatures"]
    np.testing.assert_array_equal(signatures, np.eye(1, SIGNATURE).repeat(200, axis=0))


def test_layer_codes_accept_minus_one_for_the_last():
    codes = jnp.arange(12.0).reshape(3, 2, 2)
    none = jnp.zeros(())
    latents = Latents(none, codes, none)
    assert [latents.layer_codes(i)[0, 0] for i in (0, 1, 2, -1)] == [0, 4, 8, 8]
    for layer in (0, 1, -1):
        np.testing.assert_array_equal(Latents(none, codes[0], none).layer_codes(layer), codes[0])


def test_seeder_initialisation():
    seeder = Seeder(graph_config(), jnp.float32)
    params = jax.jit(seeder.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, CODE)))["params"]
    np.testing.assert_array_equal(params["log_variance"]["bias"], np.full(WIDTH, -5))
    bound = 1 / math.sqrt(CODE)
    for array in (params["log_variance"]["kernel"], params["mean"]["kernel"]):
        assert array.min() < -0.7 * bound and 0.7 * bound < array.max()
        assert np.abs(array).max() <= bound


# Initial states.


def seeded(params, codes):
    """Means and deviations of the states for given codes, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"]["seeder"])
    centred = codes - codes.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    lines = {name: normed @ p["kernel"] + p["bias"] for name, p in params.items() if name != "norm"}
    return lines["mean"], np.exp(0.5 * lines.get("log_variance", -np.inf))


def codes_of(params, name: str) -> np.ndarray:
    """The codes of layer 0."""
    codes = np.asarray(params["params"][name]["codes"], np.float64)
    return codes[0] if codes.ndim == 3 else codes


@pytest.mark.parametrize("layers", [None, 3])
def test_states_are_seeded_from_codes_and_noise(layers):
    graph, params = make(layers=layers)
    rng = np.random.default_rng(0)
    noise = {f"{name}_states": rng.normal(size=(BATCH, 2, WIDTH)) for name in SETS}
    noise = {name: jnp.asarray(array, jnp.float32) for name, array in noise.items()}
    without, given = graph.apply(params, BATCH), graph.apply(params | {NOISE: noise}, BATCH)
    for name in SETS:
        mean, deviation = seeded(params, codes_of(params, name))
        want = np.broadcast_to(mean, (BATCH, *mean.shape))
        np.testing.assert_allclose(without[name].states, want, atol=1e-5)
        want = mean + deviation * noise[f"{name}_states"]
        np.testing.assert_allclose(given[name].states, want, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_state_noise_is_normal_and_independent(train):
    graph, params = make(count=40)
    drawn = []
    for seed in (0, 1):
        latents = graph.apply(params, BATCH, train=train, rngs=keys(state=seed, code=0))
        for name in SETS:
            mean, deviation = seeded(params, codes_of(params, name))
            drawn.append((np.asarray(latents[name].states) - mean) / deviation)
    noise = np.stack(drawn)  # by key and set, example, latent, width
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)
    assert np.abs(noise).max() > 3
    for axis in range(noise.ndim):
        alike = np.isclose(noise, np.roll(noise, 1, axis), atol=1e-4)
        assert alike.mean() < 0.01, axis


def test_states_need_a_key_only_in_training():
    graph, params = make()
    with pytest.raises(Exception, match="state"):
        graph.apply(params, BATCH, train=True)
    assert graph.apply(params, BATCH)["input"].states.shape == (BATCH, 2, WIDTH)


def test_code_noise_is_added_before_seeding_states():
    graph, params = make(code_noise=0.2, seeding="mean")
    still = graph.apply(params, BATCH, rngs=keys(code=0))
    noise = {
        f"{name}_codes": jnp.full((2, CODE), u) for name, u in zip(SETS, (0, 0.75, 1), strict=True)
    }
    latents = graph.apply(params | {NOISE: noise}, BATCH, train=True)
    for name, share in zip(SETS, (-0.2, 0.1, 0.2), strict=True):
        codes = codes_of(params, name)
        assert not np.allclose(latents[name].states, still[name].states, atol=1e-4)
        want, _ = seeded(params, codes + share * np.abs(codes))
        np.testing.assert_allclose(latents[name].states[0], want, atol=1e-5)
        np.testing.assert_allclose(still[name].states[0], seeded(params, codes)[0], atol=1e-5)
        # The latents keep their codes: the parts that use them add their own noise.
        np.testing.assert_array_equal(latents[name].codes, params["params"][name]["codes"])


def test_noiseless_states_are_the_same_for_all_examples():
    for seeding in ("mean", "code", "learned"):
        graph, params = make(seeding=seeding, code_width=WIDTH)
        latents = graph.apply(params, BATCH, train=True, rngs=keys(state=0, code=0))
        for name in SETS:
            want = {
                "mean": lambda n=name, p=params: seeded(p, codes_of(p, n))[0],
                "code": lambda n=name, p=params: codes_of(p, n),
                "learned": lambda n=name, p=params: p["params"][n]["states"],
            }[seeding]()
            want = np.broadcast_to(want, (BATCH, 2, WIDTH))
            np.testing.assert_allclose(latents[name].states, want, atol=1e-5)


def test_unseeded_mediators_have_no_states():
    graph, params = make()
    latents = graph.apply(params, BATCH, seed_mediators=False)
    assert [latents[name].states is None for name in SETS] == [False, True, False]


# Pooling. A state's first number is its confidence, and the second is what the head reads.

PARAMS = {
    "confidence": {"kernel": jnp.array([[1.0], [0.0]]), "bias": jnp.array([5.0])},
    "head": {"kernel": jnp.array([[0.0], [1.0]]), "bias": jnp.array([1.0])},
}
LOG3 = math.log(3)


def pooling(kind: str, temperature: float, dtype=jnp.float32) -> ConfidencePooling:
    return ConfidencePooling(1, kind, temperature, dtype)


def states_of(*confidences: float) -> jax.Array:
    """One latent per confidence, with values 10, 20, ..."""
    return jnp.array([[[c, 10.0 * (i + 1)] for i, c in enumerate(confidences)]])


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 3 / 4), (0.5, 9 / 10), (2.0, 0.6339746)])
@pytest.mark.parametrize("kind", ["softmax", "gumbel"])
def test_pooling_by_hand(kind, temperature, weight):
    pool = pooling(kind, temperature)
    want = 10 + 10 * weight + 1
    found = pool.apply({"params": PARAMS}, states_of(0.0, LOG3), train=False)
    np.testing.assert_allclose(found, [[want]], rtol=1e-5)
    # Noise is added to confidences, and the temperature divides both.
    noise = {"gumbel": jnp.array([[0.0, LOG3]])}
    found = pool.apply({"params": PARAMS, NOISE: noise}, states_of(0.0, 0.0), train=True)
    np.testing.assert_allclose(found, [[16.0 if kind == "softmax" else want]], rtol=1e-5)


def test_hard_pooling_takes_the_best_and_has_the_soft_gradient():
    pool = pooling("gumbel_hard", 0.5)

    def pooled(noise, states):
        variables = {"params": PARAMS, NOISE: {"gumbel": noise}}
        return pool.apply(variables, states, train=True)[0, 0]

    arguments = jnp.array([[0.0, LOG3]]), states_of(0.0, 0.0)
    np.testing.assert_allclose(pooled(*arguments), 21, rtol=1e-6)
    by_noise, by_states = jax.grad(pooled, argnums=(0, 1))(*arguments)
    # For 10 w_1 + 20 w_2 with w = (1/10, 9/10): (20 - 10) w_1 w_2 / temperature.
    np.testing.assert_allclose(by_noise, [[-1.8, 1.8]], rtol=1e-4)
    # A latent's value counts with its weight, which is 0 or 1.
    np.testing.assert_allclose(by_states[0, :, 1], [0, 1], atol=1e-6)


def test_gumbel_noise_picks_latents_at_the_rate_of_their_weights():
    pool = pooling("gumbel_hard", 0.1)
    states = jnp.broadcast_to(states_of(0.0, LOG3), (4000, 2, 2))
    found = pool.apply({"params": PARAMS}, states, train=True, rngs=keys(pooling=0))
    assert set(np.unique(found)) == {11, 21}
    assert np.mean(np.asarray(found) == 21) == pytest.approx(3 / 4, abs=0.03)
    again = pool.apply({"params": PARAMS}, states, train=False, rngs=keys(pooling=0))
    np.testing.assert_array_equal(again, found)
    other = pool.apply({"params": PARAMS}, states, train=True, rngs=keys(pooling=1))
    assert np.mean(np.asarray(other == found)) == pytest.approx(10 / 16, abs=0.05)


def test_pooling_needs_a_key_only_in_training():
    pool, states = pooling("gumbel", 1.0), states_of(0.0, LOG3)
    with pytest.raises(Exception, match="pooling"):
        pool.apply({"params": PARAMS}, states, train=True)
    np.testing.assert_allclose(pool.apply({"params": PARAMS}, states, train=False), 18.5)
    found = pooling("softmax", 1.0).apply({"params": PARAMS}, states, train=True)
    np.testing.assert_allclose(found, 18.5, rtol=1e-6)


def test_logits_and_weights_are_in_float32():
    pool = pooling("softmax", 1.0, jnp.bfloat16)
    states = states_of(0.0, LOG3).astype(jnp.bfloat16)
    assert pool.apply({"params": PARAMS}, states, train=False).dtype == jnp.float32
