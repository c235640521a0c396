"""The encoder against its equations; its initial values; stochastic depth."""

import re
from functools import partial

import jax
import naive_vit
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from tiny import SIZES, fill

from common_jax.nn.norm import LayerNorm
from common_jax.weights import table as tables
from m2mkd_jax.models import encoder, vit, vit_names, vmoe
from m2mkd_jax.models.stitch import Stitch
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.stages import stage_name

IMAGES = encoder.Interface(image_size=8, channels=3, labels=5)
MOE = MoeConfig(experts=3)


def test_network_matches_its_equations():
    sizes = SIZES | {"depths": (2, 1, 1), "norm_eps": 0.1}
    config = vmoe.VMoEConfig(moe=MOE, moe_blocks="1,3", **sizes)
    network = vmoe.build(config, IMAGES, stitch_width=12)
    params = fill(network.init)
    state = tables.write(vit_names.network_table(config.depths, heads=2, experts=3), params)
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3))
    logits, blocks = naive_vit.run(state, images, heads=2, eps=0.1)
    apply = jax.jit(partial(network.apply, record=("intermediates",)))
    found, records = apply(params, images)
    kept = [records[stage_name(i)]["intermediates"] for i in range(3)]
    for x, wanted in zip([x for one in kept for x in one["block"]], blocks, strict=True):
        np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kept[0]["embedded"][0], naive_vit.embed(state, images), atol=1e-5)
    features = naive_vit.norm(state, "norm", blocks[-1], 0.1)[:, 0]
    np.testing.assert_allclose(kept[2]["features"][0], features, rtol=1e-4, atol=1e-4)


def test_stitches_use_their_own_epsilon():
    # With a variance of 1e-6, outputs stay small with an epsilon of 1e-5, but not with one of 1e-6.
    stitch = Stitch(12, jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(0, 1e-3, (2, 5, 8)), jnp.float32)
    params = fill(stitch.init, x)
    state = {
        "ln.weight": params["params"]["norm"]["scale"],
        "ln.bias": params["params"]["norm"]["bias"],
        "fc.weight": params["params"]["linear"]["kernel"].T,
        "fc.bias": params["params"]["linear"]["bias"],
    }
    wanted = naive_vit.linear(state, "fc", naive_vit.norm(state, "ln", np.asarray(x), 1e-5))
    np.testing.assert_allclose(stitch.apply(params, x), wanted, atol=1e-5)


def test_norms_are_accurate_for_large_means():
    x = 3000 + np.random.default_rng(0).normal(size=(1, 4, 64))
    wanted = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    norm = {"scale": np.ones(64), "bias": np.zeros(64)}
    linear = {"kernel": np.eye(64), "bias": np.zeros(64)}
    plain = LayerNorm(1e-6, jnp.float32, name="norm")
    for module, params in (
        (plain, norm),
        (Stitch(64, jnp.float32), {"norm": norm, "linear": linear}),
    ):
        found = module.apply({"params": params}, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_initialisation_matches_original():
    sizes = {"patch": 8, "width": 48, "heads": 3, "depths": (1, 1, 1)}
    config = vmoe.VMoEConfig(moe=MOE, moe_blocks="1", **sizes)
    students = vmoe.build_students(config, encoder.Interface(32, 3, 40), meta_width=24)
    params = jax.jit(students.init)(jax.random.key(0))
    params = jax.tree.map(np.asarray, params)
    drawn = []
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        if re.search(r"/patches/|/moe/(up|down)$", path):
            fan_in = 8 * 8 * 3 if "/patches/" in path else 48 * 192  # fastmoe's rule for experts
            assert_uniform(leaf, 1 / fan_in**0.5, path)
        elif re.search(r"bias$|/scale$", path):
            np.testing.assert_array_equal(leaf, path.endswith("scale"), err_msg=path)
            continue
        else:
            assert_normal(leaf, 0.02, path)
        drawn.append(leaf)
    assert len(drawn) == 22
    # Each is drawn independently, and so are single experts.
    experts = params["stage_1"]["block_0"]["moe"]
    drawn += [one for name in ("up", "down") for one in experts[name][1:]]
    assert len({leaf.ravel()[0] for leaf in drawn}) == 26


def assert_uniform(leaf, bound, name):
    """Requires uniform draws from -bound to bound, within four standard errors."""
    assert 0.8 * bound < leaf.max() <= bound and -bound <= leaf.min() < -0.8 * bound, name
    assert abs(leaf.mean()) < 4 * bound / (3 * leaf.size) ** 0.5, name
    assert abs(leaf.std() * 3**0.5 / bound - 1) < 4 * (0.2 / leaf.size) ** 0.5, name


def assert_normal(leaf, std, name):
    """Requires normal draws, not truncated, within four standard errors."""
    assert abs(leaf.std() / std - 1) < 4 / (2 * leaf.size) ** 0.5, name
    assert abs(leaf.mean()) < 4 * std / leaf.size**0.5, name
    assert leaf.size < 1000 or np.abs(leaf).max() > 2.5 * std, name


@pytest.mark.parametrize("name", ["vit", "vmoe", "students"])
def test_bfloat16_network_has_bfloat16_tokens_and_float32_logits(name):
    sizes = SIZES | {"depths": (1, 1, 1)}
    network = _build(name, sizes, dtype=jnp.bfloat16)
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    for stage in (1, 2):
        x, _ = jax.eval_shape(partial(network.apply, start=stage - 1, stop=stage), params, x)
        assert x.dtype == jnp.bfloat16
        assert x == network.stages[stage].example(2)
    assert jax.eval_shape(partial(network.apply, start=2), params, x)[0].dtype == jnp.float32


def _build(name, sizes, *, dtype):
    if name == "vit":
        return vit.build(vit.ViTConfig(**sizes), IMAGES, dtype=dtype)
    config = vmoe.VMoEConfig(moe=MOE, **sizes)
    if name == "vmoe":
        return vmoe.build(config, IMAGES, stitch_width=None, dtype=dtype)
    return vmoe.build_students(config, IMAGES, meta_width=12, dtype=dtype)


def test_drop_path_drops_branches_with_draws_below_rate():
    branch = jnp.arange(1.0, 25.0).reshape(4, 3, 2)
    uniform = jnp.array([0.0, 0.2499, 0.25, 0.999])[:, None, None]
    kept = np.array([0, 0, 1, 1])[:, None, None] / 0.75
    np.testing.assert_allclose(encoder.drop_path(branch, uniform, 0.25), kept * branch, rtol=1e-6)
    narrow = encoder.drop_path(branch.astype(jnp.bfloat16), uniform, 0.25)
    assert narrow.dtype == jnp.bfloat16


def kept_branches(network, keys, *, batch=400):
    """(keys, B, branches): whether an example keeps each attention and MLP, block after block.

    The branches add 1, 2, 4 and so on, so that the sum tells which were kept.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    weight = 1
    for i, stage in enumerate(network.stages):
        for j, block in enumerate(stage.blocks):
            part = params[stage_name(i)][f"block_{j}"]
            for bias in (part["attention"]["out"]["bias"], part["mlp"]["down"]["bias"]):
                bias += weight * (1 - block.drop_path)
                weight *= 2

    @jax.jit
    @jax.vmap
    def run(key):
        images, rngs = jnp.zeros((batch, 8, 8, 3)), {"drop_path": key}
        record = ("intermediates",)
        _, records = network.apply(params, images, train=True, rngs=rngs, record=record)
        return records[stage_name(len(network) - 1)]["intermediates"]["block"][-1]

    tokens = np.asarray(run(keys))
    assert np.ptp(tokens, axis=(2, 3)).max() == 0  # a branch is dropped with all its tokens
    sums = np.rint(tokens[..., 0, 0]).astype(int)
    np.testing.assert_allclose(tokens[..., 0, 0], sums, atol=1e-4)
    return sums[..., None] // 2 ** np.arange(weight.bit_length() - 1) % 2


@pytest.mark.parametrize("scan_layers", [False, True])
def test_drop_path_draws_per_example_and_branch(scan_layers):
    config = vit.ViTConfig(depths=(1, 2), scan_layers=scan_layers, **SIZES)
    network = vit.build(config, IMAGES, drop_path=0.5)
    kept = np.hstack(kept_branches(network, jax.random.split(jax.random.key(0), 2)))
    assert kept.shape == (400, 12)
    # 0.1 is four standard errors of a fraction of 400 draws.
    rates = np.tile(np.repeat([0, 0.25, 0.5], 2), 2)
    np.testing.assert_allclose(kept.mean(axis=0), 1 - rates, atol=0.1)
    assert kept[:, rates == 0].all()
    # No branch, for this key or the other, is correlated with another.
    together = np.corrcoef(kept[:, rates > 0].T)
    assert np.abs(together - np.eye(8)).max() < 0.2
