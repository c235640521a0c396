"""NAC's layers: what they compute, by hand; their initialisation; what is drawn."""

import functools
import math

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from tiny import fill

from m2mkd_jax.nac import layers
from m2mkd_jax.nac.layers import CodeLinear, Linear, LinearConfig

# Normalisation.


def test_layer_normalisation_by_hand():
    found = layers.layer_normalise(jnp.array([[4.0, 6.0], [1e-3, -1e-3]]))
    small = 1e-3 / math.sqrt(1.1e-5)  # the variance is 1e-6, and 1e-5 is added
    np.testing.assert_allclose(found, [[-1, 1], [small, -small]], rtol=1e-5)


def test_l2_normalisation_by_hand():
    found = layers.l2_normalise(jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [0.1, 0]], rtol=1e-5)
    gradient = jax.grad(lambda x: layers.l2_normalise(x)[0])(jnp.zeros(2))
    np.testing.assert_allclose(gradient, [1e12, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("none", [0.0, 2.0]),
        ("l2", [0.0, 1.0]),
        ("layer", [-1.0, 1.0]),
        ("sigmoid", [0.5, 1 / (1 + math.exp(-2))]),
        ("tanh", [0.0, math.tanh(2)]),
    ],
)
def test_normalisations_by_name(name, want):
    np.testing.assert_allclose(
        layers.NORMALISATIONS[name](jnp.array([0.0, 2.0])), want, rtol=1e-5, atol=1e-7
    )


def test_norms_add_their_epsilon_and_take_two_passes():
    x = jnp.array([[1e-3, -1e-3], [3001.0, 2999.0]])
    norm = layers.norm("norm", jnp.float32)
    found = norm.apply(norm.init(jax.random.key(0, impl="rbg"), x), x)
    small = 1e-3 / math.sqrt(1.1e-5)
    # In one pass, the second variance would be a difference of numbers near 9e6.
    np.testing.assert_allclose(found, [[small, -small], [1, -1]], rtol=1e-5)


# Code-conditioned layers.

X, CODE = jnp.array([[[2.0, 4.0]]]), jnp.array([[2.0]])
# The code gives scales (6, 10), or (-1, 1) normalised, which the gain halves.
MODULATED = {
    "kernel": jnp.array([[1.0, 10.0], [100.0, 1000.0]]),
    "bias": jnp.array([7.0, 8.0]),
    "code_kernel": jnp.array([[3.0, 5.0]]),
}


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        # (2, 4) * (0.5, 1.5) = (1, 6)
        ({}, [1 + 600 + 7, 10 + 6000 + 8]),
        ({"add_one": False}, [-1 + 200 + 7, -10 + 2000 + 8]),
        ({"renormalization": "layer"}, [-1 + 100 + 7, -10 + 1000 + 8]),
        ({"renormalization": "l2"}, [601 / 37**0.5 + 7, 6010 / 37**0.5 + 8]),
        # (2, 4) * (4, 6) = (8, 24)
        ({"normalization": "none"}, [8 + 2400 + 7, 80 + 24000 + 8]),
    ],
)
@pytest.mark.parametrize("learnable", [True, False])
def test_a_modulated_layer_by_hand(changes, want, learnable):
    config = LinearConfig(gain=0.5, learnable_gain=learnable, **changes)
    layer = CodeLinear(config, 2, 2, 1, use_bias=True, dtype=jnp.float32)
    params = MODULATED | ({"gain": jnp.float32(0.5)} if learnable else {})
    np.testing.assert_allclose(layer.apply({"params": params}, X, CODE)[0, 0], want, rtol=1e-5)


def test_learned_gain_overrides_config():
    layer = CodeLinear(LinearConfig(gain=9.0), 2, 2, 1, use_bias=False, dtype=jnp.float32)
    params = {"kernel": MODULATED["kernel"], "code_kernel": MODULATED["code_kernel"]}
    found = layer.apply({"params": params | {"gain": jnp.float32(0.25)}}, X, CODE)
    # (2, 4) * (0.75, 1.25) = (1.5, 5)
    np.testing.assert_allclose(found[0, 0], [501.5, 5015], rtol=1e-5)


def test_the_activation_comes_last():
    config = LinearConfig(kind="plain", activation="gelu")
    layer = CodeLinear(config, 1, 2, 1, use_bias=True, dtype=jnp.float32)
    params = {"kernel": jnp.array([[0.25, -0.5]]), "bias": jnp.array([0.5, 0.0])}
    found = layer.apply({"params": params}, jnp.array([[2.0]]), CODE)
    np.testing.assert_allclose(found[0], [0.8413447, -0.1586553], rtol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "want"),
    [
        ([[1.0], [2.0]], 5 / math.sqrt(17) + 0.5),  # modulated (1, 4), of length sqrt 17
        ([[1e-3], [0.0]], math.sqrt(0.5) + 0.5),  # its square, 1e-6, is as large as the epsilon
    ],
)
def test_a_weight_modulated_layer_by_hand(kernel, want):
    layer = CodeLinear(LinearConfig("weight_modulated"), 2, 1, 1, use_bias=True, dtype=jnp.float32)
    params = {
        "kernel": jnp.array(kernel),
        "bias": jnp.array([0.5]),
        "code_kernel": jnp.array([[3.0, 5.0]]),
        "code_bias": jnp.array([-6.0, -9.0]),  # 2 * (3, 5) + (-6, -9) + 1 = (1, 2)
    }
    found = layer.apply({"params": params}, jnp.ones((1, 1, 2)), CODE)
    np.testing.assert_allclose(found[0, 0, 0], want, rtol=1e-5)


def test_is_linear_only_for_linear_maps():
    assert LinearConfig().is_linear
    assert not LinearConfig(renormalization="l2").is_linear
    assert not LinearConfig(activation="gelu").is_linear


# Initial values.


def check_uniform(array, bound: float) -> None:
    """Requires numbers that fill [-bound, bound] evenly."""
    array = np.asarray(array)
    assert -bound <= array.min() < -0.95 * bound
    assert 0.95 * bound < array.max() <= bound
    assert np.std(array) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert abs(np.mean(array)) < 0.15 * bound


@pytest.mark.parametrize("kind", ["modulated", "weight_modulated", "plain"])
@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_code_linear_initialisation(kind, gain):
    config = LinearConfig(kind, gain=0.3, weight_gain=gain)
    layer = CodeLinear(config, 144, 200, 9, use_bias=True, dtype=jnp.float32)
    x, code = jnp.zeros((1, 1, 144)), jnp.zeros((1, 9))
    params = jax.jit(layer.init)(jax.random.key(0, impl="rbg"), x, code)["params"]
    check_uniform(params["kernel"], gain / 12)
    if kind == "plain":
        check_uniform(params["bias"], 1 / 12)  # the gain applies only to weights
        return
    np.testing.assert_array_equal(params["bias"], np.zeros(200))
    check_uniform(params["code_kernel"], 1 / 3)
    if kind == "weight_modulated":
        check_uniform(params["code_bias"], 1 / 3)
    else:
        assert params["gain"] == np.float32(0.3)


def test_linear_initialisation():
    layer = Linear(300, jnp.float32)
    params = jax.jit(layer.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 25)))["params"]
    check_uniform(params["kernel"], 0.2)
    check_uniform(params["bias"], 0.2)
    assert params["kernel"].shape == (25, 300)


# What is drawn.


class Noisy(nn.Module):
    """Codes with noise, drawn twice."""

    scale: float

    @nn.compact
    def __call__(self, codes, *, train: bool):
        add = functools.partial(layers.add_code_noise, self, train=train)
        return add("one", codes, self.scale), add("two", codes, self.scale)


CODES = jnp.broadcast_to(jnp.array([-2.0, 0.0, 3.0]), (1000, 3))


def test_code_noise_is_uniform_over_its_range():
    one, two = Noisy(0.1).apply({}, CODES, train=True, rngs={"code": jax.random.key(0, impl="rbg")})
    for noised in (one, two):
        noise = np.asarray(noised - CODES)
        np.testing.assert_array_equal(noise[:, 1], 0)
        check_uniform(noise[:, 0], 0.2)
        check_uniform(noise[:, 2], 0.3)
        assert len(np.unique(noise[:, 0])) > 990  # a separate draw for each number
    assert not np.any(np.asarray(one == two)[:, [0, 2]].all(1))


def test_code_noise_has_no_gradient():
    keys = {"code": jax.random.key(0, impl="rbg")}
    _, pullback = jax.vjp(lambda c: Noisy(0.5).apply({}, c, train=True, rngs=keys)[0], CODES)
    np.testing.assert_array_equal(pullback(jnp.full(CODES.shape, 2.0))[0], 2)


def test_code_noise_by_hand():
    given = {layers.NOISE: {"one": jnp.full((1, 3), 0.75), "two": jnp.zeros((1, 3))}}
    one, two = Noisy(0.5).apply(given, CODES[:1], train=True)
    np.testing.assert_allclose(one[0], [-2 + 0.5, 0, 3 + 0.75], rtol=1e-6)
    np.testing.assert_allclose(two[0], [-2 - 1, 0, 3 - 1.5], rtol=1e-6)


@pytest.mark.parametrize(("scale", "train"), [(0.1, False), (0.0, True)])
def test_codes_are_unchanged_without_noise(scale, train):
    for codes in Noisy(scale).apply({}, CODES, train=train):
        np.testing.assert_array_equal(codes, CODES)


def test_scale_dropout_is_applied_before_adding_one():
    config = LinearConfig(normalization="none", gain=0.5, dropout=0.2)
    layer = CodeLinear(config, 400, 4, 3, use_bias=False, dtype=jnp.float32)
    codes = jax.random.normal(jax.random.key(0, impl="rbg"), (5, 3))
    params = fill(layer.init, jnp.zeros((1, 5, 400)), codes)
    scales = lambda train, key=1: np.asarray(  # noqa: E731
        layer.apply(
            params,
            codes,
            train=train,
            rngs={"code": jax.random.key(key, impl="rbg")},
            method="scales",
        )
    )
    kept, full = scales(True), scales(False)
    dropped = kept == 1
    assert 0.16 < dropped.mean() < 0.24
    assert not np.array_equal(dropped[0], dropped[1])
    np.testing.assert_allclose(kept, np.where(dropped, 1, 1 + (full - 1) / 0.8), atol=1e-5)
    assert not np.array_equal(scales(True, 2), kept)


def test_given_numbers_replace_drawn_ones():
    class Drawing(nn.Module):
        @nn.compact
        def __call__(self):
            found = layers.can_draw(self, "u", stream="code")
            return found, layers.draw(self, "u", layers.uniform((2,)), stream="code")

    keys, given = (
        {"code": jax.random.key(0, impl="rbg")},
        {layers.NOISE: {"u": jnp.array([5.0, 6.0])}},
    )
    for rngs in ({}, keys):
        found, numbers = Drawing().apply(given, rngs=rngs)
        assert found
        np.testing.assert_array_equal(numbers, [5, 6])
    found, numbers = Drawing().apply({}, rngs=keys)
    assert found and np.all((numbers >= 0) & (numbers < 1))
