"""NAC's tokenizer: sizes, the order of tokens, the trunk against plain loops, initialisation."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy.special import erf
from tiny import fill

from m2mkd_jax.nac import tokenizer
from m2mkd_jax.nac.tokenizer import Tokenizer, TokenizerConfig

TINY = TokenizerConfig("nano", stages=2, width=16, stem=2, grid_width=3)


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


# Sizes.


def test_presets_and_defaults():
    assert dict(tokenizer.PRESETS) == {
        "tiny": (3, 3, 9),
        "mini": (3, 3, 6),
        "micro": (3, 3, 3),
        "nano": (1, 1, 1),
        "pico": (1, 1, 0),
        "femto": (1, 0, 0),
        "atto": (0, 0, 0),
    }
    assert TokenizerConfig() == TokenizerConfig(
        preset="tiny", stages=2, width=384, stem=4, grid_width=64, grid_size=0, grid_resize="none"
    )


def test_widths_and_sides_by_hand():
    widths = {stages: TokenizerConfig(stages=stages).widths for stages in (1, 2, 3)}
    assert widths == {1: (96,), 2: (96, 192), 3: (96, 192, 384)}
    assert TokenizerConfig().token_width == 192 + 64
    assert TokenizerConfig(width=512, grid_width=10).token_width == 256 + 10
    sides = {size: TokenizerConfig(stages=3).side(size) for size in (224, 64, 63, 47, 15)}
    assert sides == {224: 14, 64: 4, 63: 3, 47: 2, 15: 0}


def test_preset_sets_depths():
    shapes = jax.eval_shape(
        Tokenizer(TokenizerConfig("pico", stages=3, width=16), 32, jnp.float32).init,
        jax.random.key(0, impl="rbg"),
        jnp.zeros((1, 32, 32, 3)),
    )["params"]
    assert {name for name in shapes if name.startswith("block")} == {"block_0_0", "block_1_0"}
    assert shapes["stem"]["kernel"].shape == (4, 4, 3, 4)
    assert shapes["downsample_2"]["conv"]["kernel"].shape == (2, 2, 8, 16)
    assert shapes["grid"].shape == (2, 2, 64)


# Tokens.


def test_tokens_are_in_raster_order_with_grid_after_features():
    config = TokenizerConfig("atto", stages=1, width=16, stem=2, grid_width=3)
    module = Tokenizer(config, 6, jnp.float32)
    params = fill(module.init, images(1, 6, 6, 1))
    grid = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    params["params"]["grid"] = jnp.asarray(grid)
    one, other = np.zeros((2, 6, 6, 1), np.float32)
    other[2:4, 4:] = [[[1], [2]], [[3], [-4]]]  # the patch of row 1, column 2
    tokens = np.asarray(module.apply(params, jnp.stack([one, other])))
    assert tokens.shape == (2, 9, 4 + 3)
    np.testing.assert_array_equal(tokens[1, :, 4:], grid.reshape(9, 3))
    differ = np.any(tokens[0, :, :4] != tokens[1, :, :4], axis=-1)
    assert np.flatnonzero(differ).tolist() == [1 * 3 + 2]


def normed(x, params):
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return unit * params["scale"] + params["bias"]


def patches(x, params):
    """A convolution whose stride equals its kernel size."""
    side = params["kernel"].shape[0]
    rows, columns = x.shape[0] // side, x.shape[1] // side
    y = np.zeros((rows, columns, params["kernel"].shape[-1]))
    for i in range(rows):
        for j in range(columns):
            patch = x[i * side : (i + 1) * side, j * side : (j + 1) * side]
            y[i, j] = np.tensordot(patch, params["kernel"], 3) + params["bias"]
    return y


def block(x, params):
    """A ConvNeXt block, with its depthwise 7 x 7 convolution as a sum over shifts."""
    rows, columns, _ = x.shape
    padded = np.pad(x, ((3, 3), (3, 3), (0, 0)))
    y = np.zeros_like(x) + params["depthwise"]["bias"]
    for i in range(7):
        for j in range(7):
            y += padded[i : i + rows, j : j + columns] * params["depthwise"]["kernel"][i, j, 0]
    y = normed(y, params["norm"]) @ params["up"]["kernel"] + params["up"]["bias"]
    y = y * (1 + erf(y / math.sqrt(2))) / 2
    return x + params["gamma"] * (y @ params["down"]["kernel"] + params["down"]["bias"])


def test_trunk_matches_plain_loops():
    module, image = Tokenizer(TINY, 9, jnp.float32), images(1, 9, 9, 2)
    params = fill(module.init, image)
    parts = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    x = normed(patches(np.asarray(image[0], float), parts["stem"]), parts["stem_norm"])
    x = block(x, parts["block_0_0"])
    x = patches(normed(x, parts["downsample_1"]["norm"]), parts["downsample_1"]["conv"])
    x = block(x, parts["block_1_0"])
    tokens = np.asarray(module.apply(params, image))
    assert tokens.shape == (1, 4, 8 + 3)
    np.testing.assert_allclose(tokens[0, :, :8], x.reshape(4, 8), atol=2e-5)


def test_trunk_norms_use_epsilon_1e_6():
    # A stem of weight 1 passes on patches of 2e-3 and of 0 in each of two channels.
    config = TokenizerConfig("atto", stages=1, width=8, stem=1, grid_width=1)
    module = Tokenizer(config, 1, jnp.float32)
    params = fill(module.init, images(1, 1, 1, 2))
    params["params"]["stem"] = {"kernel": jnp.eye(2)[None, None], "bias": jnp.zeros(2)}
    params["params"]["stem_norm"] = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    tokens = module.apply(params, jnp.array([[[[2e-3, 0.0]]]]))
    half = math.sqrt(0.5)  # the variance is also 1e-6
    np.testing.assert_allclose(tokens[0, 0, :2], [half, -half], rtol=1e-3)


# The grid.


@pytest.mark.parametrize(
    ("old", "new", "bins"),
    [
        (5, 3, [(0, 2), (1, 4), (3, 5)]),
        (2, 3, [(0, 1), (0, 2), (1, 2)]),
        (4, 2, [(0, 2), (2, 4)]),
    ],
)
def test_bins_of_a_smaller_or_larger_grid(old, new, bins):
    assert tokenizer._adaptive_bins(old, new) == bins


def test_fit_grid_averages_each_bin():
    grid = np.random.default_rng(1).normal(size=(5, 2, 3)).astype(np.float32)
    found = tokenizer.fit_grid(jnp.asarray(grid), (3, 3), resize="adaptive")
    rows, columns = [(0, 2), (1, 4), (3, 5)], [(0, 1), (0, 2), (1, 2)]
    want = [[grid[a:b, c:d].mean((0, 1)) for c, d in columns] for a, b in rows]
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_grid_has_configured_size_and_is_fitted():
    config = dataclasses.replace(TINY, grid_size=5, grid_resize="adaptive")
    module, image = Tokenizer(config, 8, jnp.float32), images(1, 8, 8, 2)
    params = fill(module.init, image)
    grid = np.asarray(params["params"]["grid"])
    assert grid.shape == (5, 5, 3)
    tokens = module.apply(params, image)
    # Two places per side, for rows 0 to 2 and 2 to 4.
    np.testing.assert_allclose(tokens[0, 1, 8:], grid[:3, 2:].mean((0, 1)), rtol=1e-5)


# Initialisation.


def test_tokenizer_initialisation():
    module = Tokenizer(dataclasses.replace(TINY, width=128), 32, jnp.float32)
    params = jax.jit(module.init)(jax.random.key(0, impl="rbg"), images(1, 32, 32, 3))["params"]
    assert np.std(params["grid"]) == pytest.approx(1, abs=0.15)
    convolutions = [params["stem"], params["downsample_1"]["conv"]]
    for name in ("block_0_0", "block_1_0"):
        np.testing.assert_array_equal(params[name]["gamma"], np.float32(1e-6))
        convolutions += [params[name][layer] for layer in ("depthwise", "up", "down")]
    for layer in convolutions:
        np.testing.assert_array_equal(layer["bias"], 0)
        # Normal draws: the original truncates them at 2, a hundred deviations away.
        kernel = np.asarray(layer["kernel"])
        assert np.std(kernel) == pytest.approx(0.02, rel=0.1)
        assert np.abs(kernel).max() > 0.044
