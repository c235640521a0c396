"""Objectives of m2mKD: label losses, distillation terms for one or more teachers, and the weighted
sum of both."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int


def soft_cross_entropy(
    logits: Float[Array, "B L"], targets: Float[Array, "B L"]
) -> Float[Array, ""]:
    r"""Label loss under mixing:  -1/B sum_bl y_bl log softmax(z)_bl.

    z = `logits`; y = `targets`, which are distributions over the labels (m2mKD, base criterion;
    Deep Incubation's soft-target cross entropy).
    """
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))


def smoothed_cross_entropy(
    logits: Float[Array, "B L"], labels: Int[Array, " B"], smoothing: float
) -> Float[Array, ""]:
    r"""Label loss without mixing:  1/B sum_b [(1 - s) (-log p_b,label) + s/L sum_l (-log p_bl)].

    p = softmax(`logits`), s = `smoothing`; 0 is the plain cross entropy.
    """
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return -jnp.mean((1 - smoothing) * picked + smoothing * jnp.mean(log_p, axis=-1))


def soft_distillation(
    student: Float[Array, "B L"], teacher: Float[Array, "B L"], tau: float
) -> Float[Array, ""]:
    r"""m2mKD loss, soft:  tau^2 / (B L) sum_bl t_bl (log t_bl - log s_bl),  s, t = softmax(. /
    tau).

    The mean is over B and L, as in the original, not over B: the term and its gradient are L times
    smaller than a KL divergence averaged over examples. See docs/differences.md.
    """
    # Both as logs: log(softmax) would be -inf, and the product NaN, where a probability underflows.
    log_s, log_t = jax.nn.log_softmax(student / tau), jax.nn.log_softmax(teacher / tau)
    return tau**2 * jnp.mean(jnp.exp(log_t) * (log_t - log_s))


def soft_distillation_batch_mean(
    student: Float[Array, "B L"], teacher: Float[Array, "B L"], tau: float
) -> Float[Array, ""]:
    r"""Hinton's distillation:  tau^2 / B sum_bl t_bl (log t_bl - log s_bl); L times
    `soft_distillation`."""
    return student.shape[-1] * soft_distillation(student, teacher, tau)


def hard_distillation(
    student: Float[Array, "B L"], teacher: Float[Array, "B L"], tau: float
) -> Float[Array, ""]:
    r"""m2mKD loss, hard:  cross entropy of the student with the teacher's best label; ignores
    tau."""
    del tau
    return smoothed_cross_entropy(student, jnp.argmax(teacher, axis=-1), 0.0)


# (student logits, teacher logits, temperature) -> scalar
DistillationLoss = Callable[[Float[Array, "B L"], Float[Array, "B L"], float], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """An entry of DISTILLATIONS.

    Attributes:
      loss: the function of the logits.
      idle: fields of `DistillConfig` that it does not read, and what it does instead.
    """

    loss: DistillationLoss
    idle: Mapping[str, str] = dataclasses.field(default_factory=dict)


DISTILLATIONS: dict[str, Distillation] = {
    "soft": Distillation(soft_distillation),
    "soft_batch_mean": Distillation(soft_distillation_batch_mean),
    "hard": Distillation(hard_distillation, {"tau": "takes the teacher's best label"}),
}


def mean_of_losses(
    distillation: DistillationLoss,
    student: Float[Array, "B L"],
    teachers: Float[Array, "_ B L"],
    tau: float,
) -> Float[Array, ""]:
    r"""Several teachers, each with its own loss:  1/n sum_i distillation(s, t_i)."""
    return jnp.mean(jax.vmap(lambda teacher: distillation(student, teacher, tau))(teachers))


def mean_of_probabilities(
    distillation: DistillationLoss,
    student: Float[Array, "B L"],
    teachers: Float[Array, "_ B L"],
    tau: float,
) -> Float[Array, ""]:
    r"""Several teachers merged into one, with the mean of their softened distributions:
    softmax(t / tau) = 1/n sum_i softmax(t_i / tau).

    Soft distillation then has the same gradients as `mean_of_losses`, since it is linear in the
    teacher's distribution except for a term that does not depend on the student.
    """
    log_p = jax.nn.log_softmax(teachers / tau)
    # Times tau, since `distillation` divides by it: logits that soften to the mean distribution.
    log_mean = jax.nn.logsumexp(log_p, axis=0) - jnp.log(len(teachers))
    return distillation(student, tau * log_mean, tau)


def mean_of_logits(
    distillation: DistillationLoss,
    student: Float[Array, "B L"],
    teachers: Float[Array, "_ B L"],
    tau: float,
) -> Float[Array, ""]:
    r"""Several teachers merged into one, with the mean of their logits:  t = 1/n sum_i t_i."""
    return distillation(student, jnp.mean(teachers, axis=0), tau)


# (distillation, student logits, logits of several teachers, temperature) -> scalar
COMBINATIONS: dict[
    str,
    Callable[
        [DistillationLoss, Float[Array, "B L"], Float[Array, "_ B L"], float], Float[Array, ""]
    ],
] = {
    "losses": mean_of_losses,
    "probabilities": mean_of_probabilities,
    "logits": mean_of_logits,
}


def blend(
    label_loss: Float[Array, ""], distillation: Float[Array, ""], alpha: float
) -> Float[Array, ""]:
    r"""m2mKD total:  (1 - alpha) label_loss + alpha distillation."""
    return (1 - alpha) * label_loss + alpha * distillation
