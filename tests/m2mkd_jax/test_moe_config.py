"""The choices in a mixture of experts: defaults, slots, and what is refused."""

import ast
import dataclasses
import pathlib
import re

import jax
import pytest
from jax import numpy as jnp

import m2mkd_jax
from common_jax.config import freeze
from m2mkd_jax.losses import DISTILLATIONS
from m2mkd_jax.moe.config import ROUTERS, BalanceConfig, MoeConfig, check_moe
from m2mkd_jax.moe.layer import MoeMlp

VMOE = MoeConfig(router="softmax_topk", order="priority", dispatch="capacity", groups=8)


def test_defaults_match_the_students():
    assert MoeConfig(4, 1) == MoeConfig(experts=4, chosen=1)
    moe = dataclasses.asdict(MoeConfig())
    assert moe.pop("balance") == {"importance": 0.0, "load": 0.0, "gshard": 0.0, "z": 0.0}
    expected = {
        "experts": 8,
        "chosen": 2,
        "router": "topk_softmax",
        "order": "token",
        "noise_std": 1.0,
        "dispatch": "dropless",
        "capacity_factor": 1.25,
        "groups": 1,
        "router_bias": True,
        "expert_init": "fastmoe",
    }
    # Fields specific to other routers are tested with them.
    assert {name: moe[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("factor", "tokens", "chosen", "experts", "slots"),
    [
        (1.0, 40, 2, 8, 10),
        (1.0, 41, 2, 8, 11),  # 10.25
        (1.0, 47, 2, 8, 12),  # 11.75
        (1.25, 40, 2, 8, 13),  # 12.5
        (1.0, 41, 1, 8, 6),  # 5.125
        (2.0, 12, 3, 4, 12),  # 18, and no expert has a token twice
        (0.1, 3, 1, 8, 1),  # 0.0375
    ],
)
def test_slots_are_fair_share_times_capacity_factor_rounded_up(
    factor, tokens, chosen, experts, slots
):
    config = MoeConfig(experts=experts, chosen=chosen, capacity_factor=factor)
    assert config.slots(tokens) == slots


def test_each_router_accepts_only_its_balance_losses():
    for router, losses in {
        "topk_softmax": ("importance", "gshard", "z"),
        "softmax_topk": ("importance", "load", "gshard", "z"),
        "expert_choice": ("z",),
    }.items():
        for loss in losses:
            config = MoeConfig(router=router, balance=BalanceConfig(**{loss: 0.5}))
            assert config.balance.active() == {loss: 0.5}
        for loss in {"importance", "load", "gshard", "z"}.difference(losses):
            with pytest.raises(ValueError, match=rf"balance\.{loss}=0\.5 must be 0"):
                MoeConfig(router=router, balance=BalanceConfig(**{loss: 0.5}))


@pytest.mark.parametrize("name", ROUTERS)
def test_balance_losses_of_a_router_have_a_weight_and_a_value(name):
    router = ROUTERS[name]
    assert set(router.balance) <= {field.name for field in dataclasses.fields(BalanceConfig)}

    def values(logits, key):
        losses = router.route(MoeConfig(router=name), logits, key).losses()
        return {loss: losses[loss]() for loss in router.balance}

    logits = jnp.zeros((1, 3, 8, 1) if name == "soft" else (1, 3, 8))
    for key in (None, jax.random.key(0)):
        found = jax.eval_shape(values, logits, key)
        assert [value.shape for value in found.values()] == [()] * len(router.balance)


def test_balance_loss_that_a_router_promises_but_lacks_is_not_taken_for_zero(monkeypatch):
    monkeypatch.setitem(ROUTERS, "soft", dataclasses.replace(ROUTERS["soft"], balance=("z",)))
    layer = MoeMlp(MoeConfig(router="soft", balance=BalanceConfig(z=1.0)), hidden=4)
    x = jnp.ones((1, 3, 2))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    with pytest.raises(KeyError, match="z"):
        jax.eval_shape(lambda variables: layer.apply(variables, x, mutable="moe"), variables)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "top2"}, "config.model.moe.router='top2' must be one of ['topk_softmax', "),
        ({"order": "random"}, "config.model.moe.order='random' must be one of ['token', "),
        ({"dispatch": "drop"}, "config.model.moe.dispatch='drop' must be one of ["),
        ({"expert_init": "he"}, "config.model.moe.expert_init='he' must be one of ['fastmoe', "),
        ({"experts": 0}, "config.model.moe.experts=0 must be at least 1"),
        ({"chosen": 9}, "config.model.moe.chosen=9 must be from 1 to experts=8; change either"),
        ({"groups": 0}, "config.model.moe.groups=0 must be at least 1"),
        ({"noise_std": -1.0}, "config.model.moe.noise_std=-1.0 must be at least 0"),
        ({"capacity_factor": 0.0}, "config.model.moe.capacity_factor=0.0 must be positive"),
        (
            {"balance": BalanceConfig(load=0.5)},
            "config.model.moe.balance.load=0.5 must be 0 with router='topk_softmax'",
        ),
        (
            {"router": "expert_choice", "balance": BalanceConfig(importance=1.0)},
            "config.model.moe.balance.importance=1.0 must be 0 with",
        ),
        (
            {"router": "softmax_topk", "noise_std": 0.0, "balance": BalanceConfig(load=0.5)},
            "config.model.moe.balance.load=0.5 must be 0 if noise_std is 0",
        ),
    ],
)
def test_invalid_choices_name_the_key_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        freeze(MoeConfig, fields, "config.model.moe")


def test_negative_balance_weights_are_refused():
    with pytest.raises(ValueError, match=r"^z=-1\.0 must be at least 0"):
        BalanceConfig(z=-1.0)


MESH = {"data": 2, "fsdp": 1, "expert": 4}


@pytest.mark.parametrize(
    ("config", "batch", "message"),
    [
        (
            MoeConfig(experts=6),
            8,
            "config.model.moe.experts=6 must be a multiple of the mesh's expert axis, 4; "
            "change config.mesh.expert or config.model.moe.experts",
        ),
        (MoeConfig(), 12, "a batch of 12 examples must be a multiple of the mesh's 8 devices"),
        (
            dataclasses.replace(VMOE, groups=4),
            16,
            "config.model.moe.groups=4 must be a multiple of the mesh's 8 devices; "
            "change config.mesh or config.model.moe.groups",
        ),
        (VMOE, 12, "config.model.moe.groups=8 must be a divisor of the batch, 12 examples"),
    ],
)
def test_check_moe(config, batch, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_moe(config, MESH, batch)


def test_check_moe_accepts_valid_configs():
    assert check_moe(MoeConfig(), MESH, 16) is None
    assert check_moe(VMOE, MESH, 16) is None
    assert check_moe(MoeConfig(experts=3), {}, 5) is None


def test_router_names_appear_only_in_config():
    names = ROUTERS.keys() - DISTILLATIONS.keys()  # "soft" is also a kind of distillation
    package = pathlib.Path(m2mkd_jax.__file__).parent
    asking = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert len(names) >= 3
    assert asking == {"moe/config.py"}


CAPACITY = {"capacity_factor": 2.0, "groups": 8}
ORDER = {"order": "priority"}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"noise_std": 0.5}, {"noise_std"}),
        (CAPACITY | ORDER, {*CAPACITY, *ORDER}),
        ({"router": "softmax_topk", "noise_std": 0.5, "groups": 8}, {"groups"}),
        ({"dispatch": "capacity", **CAPACITY, **ORDER}, set()),
        ({"router": "expert_choice", **CAPACITY}, set()),
        ({"router": "expert_choice", "noise_std": 0.5, **ORDER}, {"noise_std", "order"}),
        ({"router": "soft", "slots_per_expert": 2}, set()),
    ],
)
def test_idle_fields_are_detected(fields, names):
    assert MoeConfig(**fields).idle.keys() == names
