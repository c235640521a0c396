"""The whole layer: parameters, parity with the plain loop, bookkeeping, meshes, errors."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from same import assert_close
from scipy.special import softmax

from common_jax.mesh import AXES
from m2mkd_jax.moe import routers
from m2mkd_jax.moe.config import ROUTERS, BalanceConfig, MoeConfig
from m2mkd_jax.moe.layer import MoeMlp
from m2mkd_jax.moe.routing import Router, RouterConfig

B, T, D, F, E, A = 8, 5, 12, 20, 8, 2
# These tests spend their time in the compiler.
VMOE = MoeConfig(router="softmax_topk", order="priority", dispatch="capacity", groups=8)
ALL_LOSSES = BalanceConfig(importance=0.1, load=0.2, gshard=0.3, z=0.4)


def make(config, dtype=jnp.float32):
    """The layer, parameters large enough to matter, and an input."""
    layer = MoeMlp(config, F, dtype)
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((B, T, D)), dtype)
    shapes = jax.eval_shape(layer.init, jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda leaf: np.float32(0.5 * draw.standard_normal(leaf.shape)), shapes)
    return layer, params, x


@partial(jax.jit, static_argnums=0, static_argnames="train")
def run(layer, params, x, *, train=False, seed=3):
    """y, the two collections, and gradients of sum(sin(y)) + balance loss with respect to params
    and x."""

    def total(params, x):
        rngs = {"gate": jax.random.key(seed)}
        y, wrote = layer.apply(
            {"params": params}, x, train=train, rngs=rngs, mutable=["moe", "routing"]
        )
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        return jnp.sum(jnp.sin(wide)) + wrote["moe"]["balance_loss"], (y, wrote)

    gradients, (y, wrote) = jax.grad(total, (0, 1), has_aux=True)(params, x)
    return y, wrote, gradients


@partial(jax.jit, static_argnums=0)
def forward(layer, params, x):
    """y and the bookkeeping collection."""
    y, wrote = layer.apply({"params": params}, x, mutable=["moe"])
    return y, wrote["moe"]


def gate(params, x):
    return np.asarray(x) @ params["router"]["kernel"] + params["router"]["bias"]


def test_parameters_and_their_initial_values():
    layer = MoeMlp(MoeConfig(), F)
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 3, D)))
    assert set(variables) == {"params"}
    params = jax.tree.map(np.asarray, variables["params"])
    assert jax.tree.map(jnp.shape, params) == {
        "router": {"kernel": (D, E), "bias": (E,)},
        "up": (E, D, F),
        "up_bias": (E, F),
        "down": (E, F, D),
        "down_bias": (E, D),
    }
    for zero in (params["router"]["bias"], params["up_bias"], params["down_bias"]):
        assert not np.any(zero)
    np.testing.assert_allclose(np.std(params["router"]["kernel"]), 0.02, rtol=0.3)
    bound = 1 / (D * F) ** 0.5
    for name in ("up", "down"):
        np.testing.assert_allclose(np.max(np.abs(params[name])), bound, rtol=0.01)
        np.testing.assert_allclose(np.std(params[name]), bound / 3**0.5, rtol=0.05)


def test_fan_in_bounds_and_no_router_bias():
    config = MoeConfig(expert_init="fan_in", router_bias=False)
    params = jax.jit(MoeMlp(config, F).init)(jax.random.key(0), jnp.ones((1, 3, D)))["params"]
    params = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(np.max(np.abs(params["up"])), D**-0.5, rtol=0.01)
    np.testing.assert_allclose(np.max(np.abs(params["down"])), F**-0.5, rtol=0.01)
    assert set(params["router"]) == {"kernel"}


def weighted_experts(params, x, weight):
    """Every expert on every token, one after another."""
    y = jnp.zeros_like(x)
    for e in range(E):
        hidden = jax.nn.gelu(x @ params["up"][e] + params["up_bias"][e], approximate=False)
        y = y + weight[..., e, None] * (hidden @ params["down"][e] + params["down_bias"][e])
    return y


def fastmoe(params, x):
    """Specification of the students: the two largest logits, a softmax over those two, every expert
    in a loop."""
    logits = x @ params["router"]["kernel"] + params["router"]["bias"]
    top, best = jax.lax.top_k(logits, A)
    score = jax.nn.softmax(top, axis=-1)
    chosen = best[..., None] == jnp.arange(E)
    return weighted_experts(params, x, jnp.sum(jnp.where(chosen, score[..., None], 0.0), axis=-2))


def test_default_layer_matches_fastmoe_values_and_gradients():
    with jax.enable_x64(True):
        layer, params, x = make(MoeConfig(), jnp.float64)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        y, _, gradients = run(layer, params, x)

        def total(params, x):
            return jnp.sum(jnp.sin(fastmoe(params, x)))

        assert y.dtype == jnp.float64
        assert_close(y, jax.jit(fastmoe)(params, x), 1e-11)
        expected = jax.jit(jax.grad(total, (0, 1)))(params, x)
        assert_close(gradients, expected, 1e-11)
        assert np.linalg.norm(expected[0]["router"]["kernel"]) > 0.1


def test_ample_capacity_matches_dropless():
    layer, params, x = make(MoeConfig())
    roomy = MoeMlp(MoeConfig(dispatch="capacity", capacity_factor=100.0, groups=2), F)
    dropless, roomy = run(layer, params, x), run(roomy, params, x)
    assert roomy[1]["moe"]["dropped"] == 0
    assert_close(roomy[0], dropless[0], 1e-5)
    assert_close(roomy[2], dropless[2], 1e-5)


def test_unused_expert_gets_zero_gradients():
    layer, params, x = make(MoeConfig())
    params["router"]["bias"][3] = -1e4
    _, wrote, (gradients, _) = run(layer, params, x)
    assert wrote["moe"]["load"][3] == 0
    for name in ("up", "up_bias", "down", "down_bias"):
        assert not np.any(gradients[name][3])
        assert np.any(gradients[name][2])


def test_routing_collection_holds_the_choices_in_token_order():
    config = MoeConfig(router="softmax_topk", order="priority")
    layer, params, x = make(config)
    _, wrote, _ = run(layer, params, x)
    logits = gate(params, x)
    expert = np.argsort(-logits, axis=-1)[..., :A]
    weight = np.take_along_axis(softmax(logits, axis=-1), expert, axis=-1)
    np.testing.assert_allclose(wrote["routing"]["logits"], logits, atol=1e-5)
    np.testing.assert_array_equal(wrote["routing"]["expert"], expert)
    np.testing.assert_allclose(wrote["routing"]["weight"], weight, rtol=1e-5)
    counts = np.bincount(expert.ravel(), minlength=E)
    np.testing.assert_allclose(wrote["moe"]["load"], counts / counts.sum(), rtol=1e-6)
    assert wrote["moe"]["balance_loss"] == wrote["moe"]["dropped"] == 0


@pytest.mark.parametrize(("order", "served"), [("token", [0, 1]), ("priority", [1, 3])])
def test_slots_go_to_first_or_most_confident_tokens_of_each_group(order, served):
    # Four tokens per group want expert 0, which has two slots and returns 1 for any input.
    config = MoeConfig(
        experts=2, chosen=1, router="softmax_topk", order=order, dispatch="capacity", groups=2
    )
    layer, params, _ = make(dataclasses.replace(config, capacity_factor=1.0, noise_std=0.0))
    x = np.zeros((2, 4, D), np.float32)
    x[..., 0] = [1, 4, 2, 3]
    params = jax.tree.map(np.zeros_like, params)
    params["router"]["kernel"][0, 0] = 1
    params["down_bias"] += 1
    y, wrote = forward(layer, params, jnp.asarray(x))
    for row in y[..., 0]:
        np.testing.assert_array_equal(np.flatnonzero(row), served)
    assert wrote["dropped"] == 0.5


class Blend(NamedTuple):
    """A routing without pairs: token b,t gets the mean expert output for it, scaled by its
    logit."""

    logits: jax.Array

    def mix(self, x, experts):
        hidden = jnp.einsum("BTD,EDF->EBTF", x, experts.up)
        y = jnp.mean(jnp.einsum("EBTF,EFD->EBTD", hidden, experts.down), axis=0)
        return self.logits[..., None] * y, {"largest": jnp.max(self.logits)}

    def losses(self):
        return {"z": lambda: jnp.mean(self.logits**2)}

    def choices(self):
        return {"logits": self.logits}


class FirstNumber(nn.Module):
    """A gate with one parameter, which is multiplied by a token's first number."""

    @nn.compact
    def __call__(self, x):
        return x[..., 0] * self.param("gain", nn.initializers.ones, ())


def test_router_without_pairs_can_be_registered(monkeypatch):
    blend = Router(
        config=RouterConfig,
        gate=lambda config, name: FirstNumber(name=name),
        route=lambda config, logits, key: Blend(logits),
        balance=("z",),
    )
    monkeypatch.setitem(ROUTERS, "blend", blend)
    layer, params, x = make(MoeConfig(router="blend", balance=BalanceConfig(z=0.5)))
    assert params["router"].keys() == {"gain"}
    y, wrote, _ = run(layer, params, x, train=True)
    gates = np.asarray(x[..., 0]) * params["router"]["gain"]
    up, down = params["up"], params["down"]
    answers = [np.asarray(x) @ up[e] @ down[e] for e in range(E)]
    np.testing.assert_allclose(y, gates[..., None] * np.mean(answers, axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(wrote["moe"]["largest"], gates.max(), rtol=1e-6)
    np.testing.assert_allclose(wrote["moe"]["balance_loss"], 0.5 * np.mean(gates**2), rtol=1e-5)
    np.testing.assert_allclose(wrote["routing"]["logits"], gates, rtol=1e-6)
    assert set(wrote["moe"]) == {"largest", "balance_loss"}
    message = r"^chosen=1 must be 2 with router='blend', which does not .* such as 'topk_softmax'"
    with pytest.raises(ValueError, match=message):
        MoeConfig(router="blend", chosen=1)
    with pytest.raises(ValueError, match=r"^balance\.load=0\.5 must be 0 .* has only z; "):
        MoeConfig(router="blend", balance=BalanceConfig(load=0.5))
    assert MoeConfig(router="blend", experts=1).experts == 1  # fewer than the default of `chosen`


def test_collections_are_written_only_if_mutable():
    layer, params, x = make(MoeConfig())
    y = jax.eval_shape(layer.apply, {"params": params}, x)
    assert y.shape == x.shape
    _, wrote = jax.eval_shape(partial(layer.apply, mutable=["moe"]), {"params": params}, x)
    assert set(wrote) == {"moe"}
    assert set(wrote["moe"]) == {"load", "dropped", "entropy", "balance_loss"}


def test_expert_choice_is_balanced_within_every_group():
    layer, params, x = make(MoeConfig(router="expert_choice", groups=2, capacity_factor=1.0))
    y, wrote, _ = run(layer, params, x)
    np.testing.assert_allclose(wrote["moe"]["load"], np.full(E, 1 / E), rtol=1e-6)
    assert "routing" not in wrote
    # Twenty tokens per group, two experts per token on average: five slots per expert.
    assert layer.config.slots(B * T // 2) == 5
    scores = softmax(gate(params, x), axis=-1).reshape(2, -1, E)
    fifth = np.sort(scores, axis=1)[:, -5, None]
    weight = np.where(scores >= fifth, scores, 0.0).reshape(B, T, E)
    expected = jax.jit(weighted_experts)(params, x, weight)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    same = MoeMlp(dataclasses.replace(layer.config, dispatch="capacity"), F)
    y_slots, wrote, _ = run(same, params, x)
    assert wrote["moe"]["dropped"] == 0
    np.testing.assert_allclose(y_slots, y, rtol=1e-4, atol=1e-5)


def test_noise_is_drawn_in_training_only():
    layer, params, x = make(MoeConfig(router="softmax_topk", noise_std=4.0))
    still = [run(layer, params, x, seed=seed)[0] for seed in (0, 1)]
    moved = [run(layer, params, x, train=True, seed=seed)[0] for seed in (0, 1)]
    np.testing.assert_array_equal(*still)
    assert not np.allclose(*moved)
    assert not np.allclose(still[0], moved[0])
    quiet = MoeMlp(MoeConfig(router="softmax_topk", noise_std=0.0), F)
    np.testing.assert_allclose(run(quiet, params, x, train=True)[0], still[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [MoeConfig(), MoeConfig(order="priority"), MoeConfig(router="expert_choice")],
    ids=["fastmoe", "priority", "expert choice"],
)
def test_other_routers_draw_no_noise(config):
    layer, params, x = make(config)
    assert not config.noisy
    # would raise if a key were needed
    y = jax.eval_shape(partial(layer.apply, train=True), {"params": params}, x)
    assert y.shape == x.shape


def test_entropy_ignores_noise():
    layer, params, x = make(MoeConfig(router="softmax_topk", noise_std=4.0))
    gates = softmax(gate(params, x), axis=-1)
    expected = -np.mean(np.sum(gates * np.log(gates), axis=-1))
    for train in (False, True):
        _, wrote, _ = run(layer, params, x, train=train)
        np.testing.assert_allclose(wrote["moe"]["entropy"], expected, rtol=1e-4)


def test_balance_loss_by_hand():
    # All tokens have the same gates, 1/2, 1/4, 1/8, 1/8, and logits that are larger by log 4.
    balance = BalanceConfig(importance=0.1, gshard=0.3, z=0.4)
    layer, params, x = make(MoeConfig(experts=4, balance=balance))
    params = jax.tree.map(np.zeros_like, params)
    params["router"]["bias"] += np.log([2.0, 1.0, 0.5, 0.5])
    _, wrote = forward(layer, params, x)
    importance = (0.25**2 + 2 * 0.125**2) / 4 / 0.25**2
    gshard = 16 * (1 * 0.5) / 4
    z = np.log(4) ** 2
    expected = 0.1 * importance + 0.3 * gshard + 0.4 * z
    np.testing.assert_allclose(wrote["balance_loss"], expected, rtol=1e-5)


def test_balance_loss_is_the_weighted_sum():
    config = MoeConfig(router="softmax_topk", balance=ALL_LOSSES)
    layer, params, x = make(config)
    clean = jnp.asarray(gate(params, x))

    @jax.jit
    def losses(logits):
        load = routers.load_loss(clean, logits, chosen=A, std=config.noise_std)
        gshard, z = routers.gshard_loss(logits), routers.z_loss(clean)
        return {
            "importance": routers.importance_loss(clean),
            "load": load,
            "gshard": gshard,
            "z": z,
        }

    weights = dataclasses.asdict(ALL_LOSSES)
    _, wrote, _ = run(layer, params, x, train=True)
    parts = {n: weights[n] * value for n, value in losses(wrote["routing"]["logits"]).items()}
    assert min(parts.values()) > 1e-4
    np.testing.assert_allclose(wrote["moe"]["balance_loss"], sum(parts.values()), rtol=1e-5)
    # Without noise, in evaluation, the load loss is undefined and left out.
    _, wrote, _ = run(layer, params, x)
    parts = {n: weights[n] * value for n, value in losses(clean).items() if n != "load"}
    np.testing.assert_allclose(wrote["moe"]["balance_loss"], sum(parts.values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "drops"),
    [
        (dataclasses.replace(VMOE, balance=ALL_LOSSES), True),
        (MoeConfig(router="softmax_topk", balance=ALL_LOSSES), False),
        (MoeConfig(router="expert_choice", groups=8), False),  # all that are chosen are served
    ],
    ids=["capacity", "dropless", "expert choice"],
)
def test_layer_on_mesh_matches_one_device(config, drops):
    layer, params, x = make(config)
    expected = run(layer, params, x, train=True)
    mesh = jax.make_mesh((2, 2, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        jax.eval_shape(layer.init, jax.random.key(0), x[:1])
        got = run(layer, params, x, train=True)
    assert_close(got, expected, 2e-5)
    assert (expected[1]["moe"]["dropped"] > 0) == drops


@pytest.mark.parametrize("config", [MoeConfig(), VMOE], ids=["dropless", "capacity"])
def test_bfloat16(config):
    layer, params, x = make(config)
    exact = run(layer, params, x)
    y, wrote, gradients = run(MoeMlp(config, F, jnp.bfloat16), params, x)
    assert y.dtype == jnp.bfloat16
    assert wrote["routing"]["logits"].dtype == jnp.float32
    for got, true in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact[2]), strict=True):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - true) < 0.03 * np.linalg.norm(true)


@pytest.mark.parametrize("router_bias", [False, True])
def test_gate_is_exact_for_bfloat16_tokens(router_bias):
    layer, params, x = make(MoeConfig(router_bias=router_bias), jnp.bfloat16)
    apply = partial(layer.apply, mutable=["moe", "routing"])
    _, wrote = apply({"params": params}, x)
    assert wrote["moe"]["balance_loss"].dtype == jnp.float32
    logits = np.asarray(x, np.float64) @ params["router"]["kernel"]
    logits += params["router"].get("bias", 0)
    np.testing.assert_allclose(wrote["routing"]["logits"], logits, rtol=1e-5, atol=1e-5)
    text = jax.jit(apply).lower({"params": params}, x).as_text()
    assert text.count("HIGHEST, HIGHEST") == 1  # a TPU needs this to be explicit


def test_batch_not_divisible_into_groups_is_refused():
    layer, params, x = make(dataclasses.replace(VMOE, groups=3))
    with pytest.raises(ValueError, match=r"moe\.groups=3 must be a divisor of the batch, 8"):
        jax.eval_shape(layer.apply, {"params": params}, x)


@pytest.mark.parametrize("router", ROUTERS)
def test_empty_batch_gives_no_tokens(router):
    layer, params, x = make(MoeConfig(router=router))
    y = layer.apply({"params": jax.tree.map(jnp.asarray, params)}, x[:0])
    assert (y.shape, y.dtype) == ((0, T, D), x.dtype)


def test_gradients_under_vmap_are_those_of_each_example():
    layer, params, x = make(MoeConfig(experts=2, chosen=1))

    def total(params, x):
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    several = params, x[:4].reshape(2, 2, T, D)
    slope = jax.grad(total, (0, 1))
    got, alone = jax.jit(jax.vmap(slope))(*several), jax.jit(slope)
    for i in range(2):
        want = alone(*jax.tree.map(lambda leaf, i=i: leaf[i], several))
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], got), want)
