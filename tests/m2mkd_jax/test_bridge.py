"""Tokens of one layout converted to another, by hand."""

import jax
import numpy as np
from jax import numpy as jnp
from tiny import SIZES

from m2mkd_jax.models.bridge import BridgedStage, Layout, convert_tokens
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.models.vit import ViTConfig, build

ONE, FOUR = Layout(True, 0, 1), Layout(True, 0, 2)
TOKENS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)


def assert_near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_convert_tokens_to_same_layout_is_identity():
    assert convert_tokens(TOKENS, FOUR, FOUR) is TOKENS


def test_convert_tokens_averages_four_patches_and_repeats_one():
    mean = TOKENS[:, 1:].mean(axis=1, keepdims=True)
    assert_near(convert_tokens(TOKENS, FOUR, ONE), jnp.concatenate([TOKENS[:, :1], mean], axis=1))
    assert_near(convert_tokens(TOKENS[:, :2], ONE, FOUR), TOKENS[:, jnp.asarray([0, 1, 1, 1, 1])])


def test_convert_tokens_interpolates_to_larger_grid():
    grid = jnp.arange(4.0).reshape(1, 4, 1)  # value 2 row + column
    found = convert_tokens(grid, Layout(False, 0, 2), Layout(False, 0, 4)).reshape(4, 4)
    along = np.asarray([0, 0.25, 0.75, 1])
    assert_near(found, 2 * along[:, None] + along)


def test_missing_tokens_are_patch_means_and_surplus_tokens_are_dropped():
    bare, registers = Layout(False, 0, 2), Layout(True, 2, 2)
    mean = TOKENS[:, 1:].mean(axis=1, keepdims=True)
    assert_near(convert_tokens(TOKENS, FOUR, bare), TOKENS[:, 1:])
    full = convert_tokens(TOKENS, FOUR, registers)
    assert_near(full, jnp.concatenate([TOKENS[:, :1], mean, mean, TOKENS[:, 1:]], axis=1))
    assert_near(convert_tokens(full, registers, FOUR), TOKENS)
    assert_near(convert_tokens(TOKENS[:, 1:], bare, FOUR)[:, :1], mean)
    assert (registers.count, str(registers)) == (7, "class token, 2 registers, 2 x 2 patches")


def test_bridged_stage_converts_tokens_around_the_stage():
    network = build(ViTConfig(depths=(1, 1, 1), **SIZES), Interface(8, 1, 10))
    for i, stage in enumerate(network.stages):
        bridged = BridgedStage(stage, FOUR, ONE, embeds=i == 0, classifies=i == 2)
        example = bridged.example(2)
        assert example.shape == ((2, 8, 8, 1) if i == 0 else (2, 2, 16))
        x = jax.random.normal(jax.random.key(i), example.shape)
        inner = convert_tokens(x, ONE, FOUR) if i else x
        params = bridged.init(jax.random.key(0), x, train=False)
        plain = stage.init(jax.random.key(0), inner, train=False)
        assert jax.tree.structure(params) == jax.tree.structure(plain)
        y = stage.apply(params, inner, train=False)
        expected = convert_tokens(y, FOUR, ONE) if i < 2 else y
        assert_near(bridged.apply(params, x, train=False), expected)
