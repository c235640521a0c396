"""Modules in a meta model of toy stages: which stages run, which are in training mode, where
gradients go."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from common_jax.state import fold_name
from m2mkd_jax.hybrid import Pair, module_logits, pair_logits, replace_stage, shared_tokens
from m2mkd_jax.stages import Network, stage_name

T, WIDTH = 2, 3
RNGS = {"noise": jax.random.key(7)}


class Layer(nn.Module):
    """factor tanh(x kernel), times normal draws in training; at most `tokens` tokens. The last
    layer returns their mean as logits."""

    tokens: int = T
    factor: float = 1.0
    last: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (WIDTH, WIDTH))
        y = self.factor * jnp.tanh(x[:, : self.tokens] @ kernel)
        if train:
            y *= jax.random.normal(self.make_rng("noise"), y.shape)
        self.sow("moe", "mean", jnp.mean(y))
        return jnp.mean(y, axis=(1, 2)) if self.last else y

    def example(self, batch):
        return jax.ShapeDtypeStruct((batch, T, 1, WIDTH), jnp.float32)


LAST = Layer(last=True)
ALIKE = Network((Layer(), Layer(), LAST))
# The first student returns a single token, as a NAC's does.
PAIR = Pair(ALIKE, ALIKE, Network((Layer(tokens=1), Layer(), LAST)))
PARAMS = {
    role: getattr(PAIR, role).init(jax.random.key(number))
    for number, role in enumerate(("meta", "teacher", "student"))
}
# One pixel per token, so that a layer takes images just like tokens.
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, T, 1, WIDTH)), jnp.float32)
# Which modules are run together.
TOGETHER = [(0,), (1,), (2,), (0, 2), (0, 1, 2)]


def run_stages(role, own, *, training=(), params=PARAMS, images=IMAGES):
    """The meta model with stage `own` of `role`, run stage by stage; the stages in `training` draw
    from the stage's key."""
    x = images
    for stage in range(3):
        whose, name = role if stage == own else "meta", stage_name(stage)
        rngs = {"noise": fold_name(RNGS["noise"], name)}
        layer = getattr(PAIR, whose).stages[stage]
        x = layer.apply({"params": params[whose][name]}, x, train=stage in training, rngs=rngs)
    return x


def assert_near(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("stages", TOGETHER)
def test_pair_logits_replace_one_stage_of_the_meta_model(stages):
    taught, logits, _ = pair_logits(PAIR, PARAMS, IMAGES, stages=stages, train=False)
    assert set(taught) == set(logits) == set(stages)
    for own in stages:
        assert_near(taught[own], run_stages("teacher", own))
        assert_near(logits[own], run_stages("student", own))


@pytest.mark.parametrize("stages", TOGETHER)
def test_only_students_are_in_training_mode(stages):
    taught, logits, _ = pair_logits(PAIR, PARAMS, IMAGES, stages=stages, train=True, rngs=RNGS)
    for own in stages:
        assert_near(taught[own], run_stages("teacher", own))
        assert_near(logits[own], run_stages("student", own, training=(own,)))


@pytest.mark.parametrize("stages", TOGETHER)
def test_student_records_are_returned(stages):
    _, _, recorded = pair_logits(PAIR, PARAMS, IMAGES, stages=stages, train=False)
    assert set(recorded) == {stage_name(own) for own in stages}
    name = stage_name(stages[-1])
    x = IMAGES
    for stage in range(stages[-1]):
        x = Layer().apply({"params": PARAMS["meta"][stage_name(stage)]}, x, train=False)
    y = PAIR.student.stages[stages[-1]].apply({"params": PARAMS["student"][name]}, x, train=False)
    assert_near(recorded[name]["moe"]["mean"][0], jnp.mean(y))


def kernels(tree):
    """Whether each stage has a gradient."""
    return [bool(np.any(tree[stage_name(stage)]["kernel"])) for stage in range(3)]


def test_student_gradients_pass_only_through_later_stages():
    def total(params, images):
        return jnp.sum(pair_logits(PAIR, params, images, stages=(1,), train=False)[1][1] ** 2)

    by_params, by_images = jax.grad(total, argnums=(0, 1))(PARAMS, IMAGES)
    assert not np.any(by_images)
    assert kernels(by_params["student"]) == [False, True, False]
    assert kernels(by_params["meta"]) == [False, False, True]
    assert kernels(by_params["teacher"]) == [False] * 3

    def plain(student):
        return jnp.sum(run_stages("student", 1, params=PARAMS | {"student": student}) ** 2)

    want = jax.grad(plain)(PARAMS["student"])
    jax.tree.map(assert_near, by_params["student"], want)


def test_no_gradient_passes_through_a_teacher():
    def total(params, images):
        return jnp.sum(pair_logits(PAIR, params, images, stages=(0, 1), train=False)[0][1])

    assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(total, (0, 1))(PARAMS, IMAGES)))


@pytest.mark.parametrize("stages", TOGETHER)
@pytest.mark.parametrize("train_meta", [False, True])
def test_train_and_train_meta_are_independent(stages, train_meta):
    hybrids = {own: replace_stage(PAIR.meta, own, PAIR.teacher) for own in stages}
    hidden = shared_tokens(hybrids, PARAMS["meta"], IMAGES, train=train_meta, rngs=RNGS)
    for module in (False, True):
        logits, _ = module_logits(
            hybrids,
            PARAMS["meta"],
            PARAMS["teacher"],
            hidden,
            train=module,
            train_meta=train_meta,
            rngs=RNGS,
        )
        for own in stages:
            around = {0, 1, 2} - {own} if train_meta else set()
            training = around | ({own} if module else set())
            assert_near(logits[own], run_stages("teacher", own, training=training))


def test_shared_tokens_come_from_meta_model_without_gradient():
    hybrids = {own: replace_stage(PAIR.meta, own, PAIR.student) for own in range(3)}
    hidden = shared_tokens(hybrids, PARAMS["meta"], IMAGES)
    x = IMAGES
    for own in range(3):
        assert_near(hidden[own], x)
        x = Layer().apply({"params": PARAMS["meta"][stage_name(own)]}, x, train=False)

    def total(meta, images):
        return sum(jnp.sum(x) for x in shared_tokens(hybrids, meta, images).values())

    gradients = jax.grad(total, (0, 1))(PARAMS["meta"], IMAGES)
    assert not any(np.any(g) for g in jax.tree.leaves(gradients))


def test_stages_that_differ_between_hybrids_are_not_shared():
    """For example, hybrids whose stochastic depth ramps over different numbers of blocks."""
    short = Network((Layer(tokens=1), Layer(), LAST))
    hidden = shared_tokens({1: PAIR.meta, 2: short}, PARAMS["meta"], IMAGES)
    assert hidden[1].shape == (4, T, 1, WIDTH) and hidden[2].shape == (4, 1, 1, WIDTH)


def test_later_stages_that_differ_between_hybrids_run_separately():
    halved = Network((Layer(), Layer(), Layer(factor=0.5, last=True)))
    arguments = PARAMS["meta"], PARAMS["teacher"], {0: IMAGES, 1: IMAGES}
    logits, _ = module_logits({0: ALIKE, 1: halved}, *arguments)
    plain, _ = module_logits({0: ALIKE, 1: ALIKE}, *arguments)
    assert_near(logits[0], plain[0])
    assert_near(logits[1], plain[1] / 2)


def test_only_parameters_of_run_stages_are_needed():
    meta = {name: PARAMS["meta"][name] for name in ("stage_0", "stage_2")}
    params = {"meta": meta} | {
        role: {"stage_1": PARAMS[role]["stage_1"]} for role in ("teacher", "student")
    }
    _, logits, _ = pair_logits(PAIR, params, IMAGES, stages=(1,), train=False)
    assert_near(logits[1], run_stages("student", 1))


def test_replace_stage_leaves_the_meta_model_unchanged():
    other = Network((Layer(tokens=1), Layer(tokens=1), Layer(tokens=1, last=True)))
    for own in range(3):
        found = replace_stage(PAIR.meta, own, other).stages
        assert [stage.tokens for stage in found] == [1 if i == own else T for i in range(3)]
    assert [stage.tokens for stage in PAIR.meta.stages] == [T] * 3


def test_networks_with_different_numbers_of_stages_are_refused():
    short = Network((Layer(), Layer()))
    with pytest.raises(ValueError, match=r"has 3 stages, but the module's network has 2"):
        replace_stage(PAIR.meta, 0, short)
    for role in ("meta", "teacher", "student"):
        with pytest.raises(ValueError, match=rf"the same number of depths.*'{role}': 2"):
            dataclasses.replace(PAIR, **{role: short})
