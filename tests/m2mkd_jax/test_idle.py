"""Fields that are set but have no effect given the others."""

import dataclasses
import functools
import logging

import jax
import pytest
from changed import changed
from jax import numpy as jnp

from common_jax import app
from m2mkd_jax.config import Config, Recipe, SourcesConfig
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.moe.config import BalanceConfig, MoeConfig
from m2mkd_jax.moe.routers import softmax_topk, topk_softmax
from m2mkd_jax.nac.graphs import FIELDS, GENERATORS, PriorConfig, make_graph
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.phases.fields import idle, warn_of_networks

MOVED = AugmentConfig(rotate=10.0, scale=0.1, shift=1.0, padding=2)
START = Config(phase="end_to_end", module="all")


def with_images(side, **augment):
    data = dataclasses.replace(START.data, image_size=side)
    return dataclasses.replace(START, data=data, augment=dataclasses.replace(MOVED, **augment))


@pytest.mark.parametrize(
    ("side", "randaugment", "names"),
    [
        (32, False, []),
        (32, True, ["rotate", "scale", "shift"]),
        (33, False, ["padding", "rotate", "scale", "shift"]),
    ],
)
def test_movement_is_idle_for_large_images_and_randaugment(side, randaugment, names):
    config = with_images(side, randaugment=randaugment)
    assert sorted(idle(config)) == [f"augment.{name}" for name in names]


def test_fields_that_the_phase_does_not_read_are_not_listed():
    """A flag for one of these has its own warning."""
    moe = MoeConfig(capacity_factor=3.0)
    model = dataclasses.replace(START.model, moe=moe)
    assert list(idle(dataclasses.replace(START, model=model))) == ["model.moe.capacity_factor"]
    meta = dataclasses.replace(START, phase="pretrain_meta", model=model)
    assert idle(meta) == {}


def test_warmup_steps_without_effect_are_listed():
    optim = dataclasses.replace(START.optim, warmup_steps=5)
    assert list(idle(dataclasses.replace(START, optim=optim))) == ["optim.warmup_steps"]


def test_idle_fields_give_a_warning_with_the_reason(caplog):
    with caplog.at_level(logging.WARNING):
        app.warn_of_idle(idle(with_images(64, rotate=0.0, scale=0.0, shift=0.0)))
    (record,) = caplog.records
    assert record.message == (
        "config.augment.padding changes nothing: it is for images of at most 32 pixels, and these "
        "have 64"
    )


SWITCHED_OFF = [
    ("augment.magnitude", 3.0, {"augment.randaugment": True}),
    ("augment.mix_probability", 0.5, {"augment.mixup": 0.2}),
    ("augment.switch", 0.3, {"augment.mixup": 0.2, "augment.cutmix": 1.0}),
    ("baseline.alpha", 0.9, {"baseline.kind": "soft"}),
    ("baseline.tau", 2.0, {"baseline.kind": "soft"}),
    ("data.split_seed", 3, {"data.source": "folder", "data.test_share": 0.2}),
    ("model.moe.experts", 2, {"model.moe_blocks": "all"}),
    ("ood.path", "there", {"ood.source": "folder"}),
    ("optim.no_decay", "x", {"optim.decay_all": False}),
    ("regularizers.hinge.weight", 1.0, {"model": NacConfig()}),
    ("sources.teacher", "there", {"baseline.kind": "soft"}),
]


@pytest.mark.parametrize(("path", "value", "reads"), SWITCHED_OFF, ids=lambda x: str(x)[:20])
def test_fields_switched_off_by_others_are_idle(path, value, reads):
    off = changed("optim.decay_all", True, changed("model.moe_blocks", "none", START))
    config = changed(path, value, off)
    assert [*idle(config)] in ([path], [path.split(".")[0]], [path.rpartition(".")[0]])
    for name, one in reads.items():
        config = changed(name, one, config)
    assert [*idle(config)] == []


NAC = {"model": NacConfig()}
STUDENTS = {"phase": "distill", "model.depths": (1, 1, 1, 1)}
SWITCHES = [
    ("augment.mixup", 0.2, {"augment.mix_probability": 0.0}, {"augment.mix_probability": 0.5}),
    ("drop_path", 0.1, STUDENTS, STUDENTS | {"model.depths": (1, 2, 1, 1)}),
    ("drop_path", 0.1, STUDENTS, STUDENTS | NAC),
    ("evaluation.noise", "fixed", {}, NAC),
    ("model.kernel.temperature", 0.1, NAC | {"model.kernel.stochastic": False}, NAC),
    ("model.kernel.empty_row", "nan", NAC | {"model.mask": False}, NAC),
    ("model.kernel.truncation_kind", "masked", NAC | {"model.kernel.truncation": None}, NAC),
    ("model.linear.gain", 0.5, NAC | {"model.linear.kind": "plain"}, NAC),
    ("model.linear.dropout", 0.5, NAC | {"model.linear.kind": "weight_modulated"}, NAC),
    (
        "model.prior.rewire",
        0.1,
        NAC | {"model.prior.graph": "grid"},
        NAC | {"model.prior.graph": "watts_strogatz"},
    ),
    ("model.prior.steps", 9, NAC, NAC | {"model.prior.graph": "grid"}),
    ("model.read_out_head_norm", False, NAC, NAC | {"model.read_out_head": True}),
    (
        "model.temperature",
        0.5,
        NAC | {"model.read_out_head": True, "model.pooling": "first_slot"},
        NAC | {"model.read_out_head": True},
    ),
    ("regularizers.blocks.within", 0.5, NAC, NAC | {"regularizers.blocks.weight_end": 1.0}),
    ("regularizers.hinge.hinge", 0.1, NAC, NAC | {"regularizers.hinge.weight": 0.5}),
]


@pytest.mark.parametrize(("path", "value", "off", "on"), SWITCHES)
def test_field_is_idle_only_while_it_is_switched_off(path, value, off, on):
    for fields, listed in ((off, [path]), (on, [])):
        items = (fields | {path: value}).items()
        config = functools.reduce(lambda config, item: changed(*item, config), items, START)
        assert list(idle(config)) == listed


def test_layers_that_differ_between_iterations_may_read_any_field():
    layers = {"iterations": 2, "layerwise": {"kernel/stochastic": (False, True)}}
    model = changed("kernel.stochastic", False, NacConfig(**layers))
    model = changed("kernel.temperature", 0.1, model)
    assert idle(dataclasses.replace(START, model=model)) == {}


@pytest.mark.parametrize("graph", GENERATORS)
def test_graphs_read_exactly_their_declared_fields(graph):
    read = set()

    class Recorder(PriorConfig):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    config = Recorder(graph, dims=(4, 4), height=3)
    read.clear()
    make_graph(config, nodes=15 if graph == "balanced_tree" else 16, seed=0)
    fields = {field.name for field in dataclasses.fields(PriorConfig)}
    assert read & fields - {"graph"} == {*FIELDS[graph]}


def test_pipeline_recipes_are_checked_individually():
    recipe = Recipe(augment=AugmentConfig(switch=0.1))
    config = dataclasses.replace(START, phase="pipeline", recipes={"distill": recipe})
    assert list(idle(config)) == ["recipes.distill.augment.switch"]
    config = changed("model.depths", (1, 1, 1, 1), config)
    config = dataclasses.replace(config, recipes={"distill": Recipe(drop_path=0.1)})
    assert list(idle(config)) == ["recipes.distill.drop_path"]


@pytest.mark.parametrize(
    ("moe", "warns"),
    [
        (MoeConfig(chosen=1), True),
        (MoeConfig(chosen=2), False),
        (MoeConfig(chosen=1, router="softmax_topk"), False),
        (MoeConfig(chosen=1, balance=BalanceConfig(z=0.1)), False),
    ],
)
def test_router_without_a_gradient_gives_a_warning(moe, warns, caplog):
    config = changed("model.moe", moe, START)
    warn_of_networks(config)
    assert ("leaves the router untrained" in caplog.text) == warns
    caplog.clear()
    warn_of_networks(changed("phase", "pretrain_meta", config))
    assert not caplog.text


@pytest.mark.parametrize(
    ("distill", "meta", "warns"), [("soft", "", True), ("soft", "m", False), ("none", "", False)]
)
def test_teacher_in_a_new_meta_model_gives_a_warning(distill, meta, warns, caplog):
    config = changed("distill.kind", distill, changed("phase", "pipeline", START))
    sources = SourcesConfig(teacher="runs/teacher", meta=meta)
    warn_of_networks(changed("sources", sources, config))
    said = "config.sources.teacher=runs/teacher teaches inside a meta model that this pipeline"
    assert (said in caplog.text) == warns


@pytest.mark.parametrize("phase", ["distill", "end_to_end"])
def test_unused_teacher_has_the_reason_of_its_phase(phase):
    section = {"distill": "distill", "end_to_end": "baseline"}[phase]
    config = changed("sources.teacher", "t", changed("phase", phase, START))
    config = changed(f"{section}.kind", "none", config)
    assert idle(config)["sources.teacher"] == f"config.{section}.kind='none' uses no teacher"


def test_topk_softmax_with_one_expert_has_no_gradient():
    def total(logits, route):
        return jnp.sum(route(logits, chosen=1, slots=0, order="token").weight ** 2)

    logits = jax.random.normal(jax.random.key(0), (1, 5, 4))
    assert not jnp.any(jax.grad(total)(logits, topk_softmax))
    assert jnp.any(jax.grad(total)(logits, softmax_topk))


@pytest.mark.parametrize(
    ("phase", "warns"), [("pipeline", True), ("end_to_end", True), ("distill", False)]
)
def test_module_is_idle_in_end_to_end_and_pipeline(phase, warns):
    assert ("module" in idle(changed("module", "1", changed("phase", phase, START)))) == warns
