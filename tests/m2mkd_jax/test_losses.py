"""The objectives against their formulas in float64, and against each other."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from m2mkd_jax import losses

B, L = 6, 9
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (jnp.asarray(RNG.normal(0, 3, (B, L)), jnp.float32) for _ in range(2))
LABELS = jnp.asarray(RNG.integers(0, L, B))
TARGETS = jnp.asarray(RNG.dirichlet(np.ones(L), B), jnp.float32)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def assert_equal_up_to_rounding(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_soft_cross_entropy():
    want = -np.sum(TARGETS * log_softmax(STUDENT)) / B
    assert_equal_up_to_rounding(losses.soft_cross_entropy(STUDENT, TARGETS), want)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_cross_entropy(smoothing):
    log_p = log_softmax(STUDENT)
    want = -(1 - smoothing) * log_p[range(B), LABELS].mean() - smoothing * log_p.mean()
    assert_equal_up_to_rounding(losses.smoothed_cross_entropy(STUDENT, LABELS, smoothing), want)
    smooth = (1 - smoothing) * jnp.eye(L)[LABELS] + smoothing / L
    assert_equal_up_to_rounding(losses.soft_cross_entropy(STUDENT, smooth), want)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation(tau):
    log_s, log_t = log_softmax(STUDENT / tau), log_softmax(TEACHER / tau)
    divergence = np.sum(np.exp(log_t) * (log_t - log_s))
    assert_equal_up_to_rounding(
        losses.soft_distillation(STUDENT, TEACHER, tau), tau**2 * divergence / (B * L)
    )
    batch_mean = losses.soft_distillation_batch_mean(STUDENT, TEACHER, tau)
    assert_equal_up_to_rounding(batch_mean, tau**2 * divergence / B)


def test_batch_mean_gradient_is_larger_by_the_number_of_labels():
    gradients = [
        jax.grad(losses.DISTILLATIONS[kind].loss)(STUDENT, TEACHER, 2.0)
        for kind in ("soft", "soft_batch_mean")
    ]
    np.testing.assert_allclose(gradients[1], L * gradients[0], rtol=1e-6)


def test_hard_distillation_is_cross_entropy_with_the_teacher_argmax():
    best = TEACHER.argmax(-1)
    want = losses.smoothed_cross_entropy(STUDENT, best, 0.0)
    for tau in (1.0, 5.0):
        assert losses.hard_distillation(STUDENT, TEACHER, tau) == want


def test_soft_distillation_from_a_confident_teacher_is_hard():
    certain = 100.0 * jnp.eye(L)[TEACHER.argmax(-1)]
    soft = losses.soft_distillation_batch_mean(STUDENT, certain, 1.0)
    assert_equal_up_to_rounding(soft, losses.hard_distillation(STUDENT, TEACHER, 1.0))


def test_student_equal_to_its_teacher_has_zero_loss_and_gradient():
    assert losses.soft_distillation(TEACHER, TEACHER, 2.0) == 0
    gradient = jax.grad(losses.soft_distillation)(TEACHER, TEACHER, 2.0)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_blend(alpha):
    blended = losses.blend(jnp.float32(2), jnp.float32(5), alpha)
    assert_equal_up_to_rounding(blended, (1 - alpha) * 2.0 + alpha * 5.0)


# Logits of the probabilities (1/2, 1/4, 1/4) and (1/8, 1/8, 3/4).
HALF, EIGHTH = np.log([[0.5, 0.25, 0.25]]), np.log([[0.125, 0.125, 0.75]])
LN2, LN3 = np.log(2), np.log(3)
# sum t (log t - log s), t = (1/8, 1/8, 3/4), s = (1/2, 1/4, 1/4)
DIVERGENCE = (-2 * LN2 - LN2) / 8 + 0.75 * LN3


@pytest.mark.parametrize(
    ("kind", "want"),
    [("soft", DIVERGENCE / 3), ("soft_batch_mean", DIVERGENCE), ("hard", 2 * LN2)],
)
def test_each_kind_of_distillation_by_hand(kind, want):
    student, teacher = jnp.asarray(HALF, jnp.float32), jnp.asarray(EIGHTH, jnp.float32)
    assert losses.DISTILLATIONS[kind].loss(student, teacher, 1.0) == pytest.approx(want, rel=1e-5)
    if kind != "hard":  # doubled logits at a doubled temperature give the same distributions
        hot = losses.DISTILLATIONS[kind].loss(2 * student, 2 * teacher, 2.0)
        assert hot == pytest.approx(4 * want, rel=1e-5)


def test_label_losses_by_hand():
    logits = jnp.asarray(np.concatenate([HALF, EIGHTH]), jnp.float32)
    labels = jnp.asarray([0, 2])
    first, second = LN2, 2 * LN2 - LN3  # -log 1/2, -log 3/4
    plain = losses.smoothed_cross_entropy(logits, labels, 0.0)
    assert plain == pytest.approx((first + second) / 2, rel=1e-5)
    means = (LN2 + 2 * LN2 + 2 * LN2) / 3, (3 * LN2 + 3 * LN2 + 2 * LN2 - LN3) / 3
    smoothed = losses.smoothed_cross_entropy(logits, labels, 0.25)
    want = 0.75 * (first + second) / 2 + 0.25 * sum(means) / 2
    assert smoothed == pytest.approx(want, rel=1e-5)
    targets = jnp.asarray([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    soft = losses.soft_cross_entropy(logits, targets)
    assert soft == pytest.approx((2 * LN2 + (3 * LN2 + second) / 2) / 2, rel=1e-5)


def test_gradients_are_the_differences_of_the_distributions():
    """d/dz of the label loss is (p - y) / B; of soft distillation, tau (s - t) / (B L)."""
    p, best = np.exp(log_softmax(STUDENT)), np.asarray(TEACHER.argmax(-1))
    gradient = jax.grad(losses.soft_cross_entropy)(STUDENT, TARGETS)
    np.testing.assert_allclose(gradient, (p - TARGETS) / B, rtol=1e-4, atol=1e-6)
    gradient = jax.grad(losses.hard_distillation)(STUDENT, TEACHER, 3.0)
    np.testing.assert_allclose(gradient, (p - np.eye(L)[best]) / B, 1e-4, 1e-6)
    for tau in (1.0, 2.5):
        s, t = (np.exp(log_softmax(logits / tau)) for logits in (STUDENT, TEACHER))
        gradient = jax.grad(losses.soft_distillation)(STUDENT, TEACHER, tau)
        np.testing.assert_allclose(gradient, tau * (s - t) / (B * L), rtol=1e-4, atol=1e-6)


TEACHERS = jnp.stack([TEACHER, jnp.asarray(RNG.normal(0, 3, (B, L)), jnp.float32)])


def combined(name, kind, tau, teachers=TEACHERS):
    return losses.COMBINATIONS[name](losses.DISTILLATIONS[kind].loss, STUDENT, teachers, tau)


@pytest.mark.parametrize("kind", losses.DISTILLATIONS)
def test_several_teachers_by_hand(kind):
    tau, one = 2.0, losses.DISTILLATIONS[kind].loss
    each = [one(STUDENT, teacher, tau) for teacher in TEACHERS]
    assert_equal_up_to_rounding(combined("losses", kind, tau), np.mean(each))
    mean = np.mean([np.exp(log_softmax(teacher / tau)) for teacher in TEACHERS], axis=0)
    # tau log p are logits of the distribution p.
    ensemble = jnp.asarray(tau * np.log(mean), jnp.float32)
    assert_near = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    assert_near(combined("probabilities", kind, tau), one(STUDENT, ensemble, tau))
    assert_near(combined("logits", kind, tau), one(STUDENT, TEACHERS.mean(axis=0), tau))


@pytest.mark.parametrize("name", losses.COMBINATIONS)
@pytest.mark.parametrize("kind", losses.DISTILLATIONS)
def test_duplicate_teacher_equals_a_single_one(name, kind):
    twice = combined(name, kind, 2.0, jnp.stack([TEACHER, TEACHER]))
    once = losses.DISTILLATIONS[kind].loss(STUDENT, TEACHER, 2.0)
    np.testing.assert_allclose(twice, once, rtol=1e-5)


def test_means_of_losses_and_probabilities_have_equal_soft_gradients():
    def gradient(name, kind):
        one = losses.DISTILLATIONS[kind].loss
        return jax.grad(lambda student: losses.COMBINATIONS[name](one, student, TEACHERS, 2.0))(
            STUDENT
        )

    soft = {name: gradient(name, "soft") for name in losses.COMBINATIONS}
    np.testing.assert_allclose(soft["losses"], soft["probabilities"], rtol=1e-4, atol=1e-7)
    assert np.abs(soft["losses"] - soft["logits"]).max() > 1e-3
    hard = [gradient(name, "hard") for name in ("losses", "probabilities")]
    assert np.abs(hard[0] - hard[1]).max() > 1e-3
