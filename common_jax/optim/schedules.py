"""Learning-rate schedules, as functions of the 0-based step."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import optax
from jax import numpy as jnp

if TYPE_CHECKING:
    from common_jax.optim.config import OptimConfig

Schedule = Callable[[jax.Array], jax.Array]


def epoch_cosine(config: "OptimConfig", steps_per_epoch: int, *, lag: int = 1) -> Schedule:
    """Linear warm-up, then half a cosine; constant within an epoch and `lag` epochs late.

        f(t) = warmup_lr + t (peak - warmup_lr) / W                         t < W
        f(t) = min_lr + (peak - min_lr) (1 + cos(pi t / E)) / 2             t >= W

    with W warm-up epochs out of E. Epoch e uses f(max(e - lag, 0)): timm's scheduler is stepped
    after each epoch with that epoch's number, which is a lag of 1. f jumps at W, because the cosine
    is not shifted by the warm-up. The schedule is a function of the 0-based step.
    """
    epochs = math.ceil(config.total_steps(steps_per_epoch) / steps_per_epoch)
    table = [_epoch_value(config, epochs, max(epoch - lag, 0)) for epoch in range(epochs)]
    values = jnp.asarray(table, jnp.float32)
    return lambda step: values[jnp.minimum(step // steps_per_epoch, epochs - 1)]


def warmup_cosine(config: "OptimConfig", steps_per_epoch: int) -> Schedule:
    """Linear from warmup_lr to the peak over the warm-up, then half a cosine to min_lr, per
    step."""
    config.check_warmup(steps_per_epoch)
    warmup, total = config.total_warmup(steps_per_epoch), config.total_steps(steps_per_epoch)
    return optax.warmup_cosine_decay_schedule(
        config.warmup_lr if warmup else config.peak_lr, config.peak_lr, warmup, total, config.min_lr
    )


def inverse_sqrt(config: "OptimConfig", steps_per_epoch: int) -> Schedule:
    """Linear from 0 to the peak over W steps, then the peak times sqrt(W / s) (Vaswani et al. 2017,
    section 5.3). Without a warm-up, W is 1: the peak at the first step, half of it at the fourth.
    """
    warmup, peak = max(config.total_warmup(steps_per_epoch), 1), config.peak_lr

    def rate(step: jax.Array) -> jax.Array:
        done = (jnp.asarray(step) + 1).astype(jnp.float32)
        return peak * jnp.minimum(done / warmup, jnp.sqrt(warmup / done))

    return rate


def polynomial(config: "OptimConfig", steps_per_epoch: int) -> Schedule:
    """(peak - min_lr) (1 - s / S)^power + min_lr at step s of S."""
    total = config.total_steps(steps_per_epoch)
    return optax.polynomial_schedule(config.peak_lr, config.min_lr, config.power, total)


def constant(config: "OptimConfig", steps_per_epoch: int) -> Schedule:
    """The peak throughout; ignores the warm-up."""
    del steps_per_epoch
    return optax.constant_schedule(config.peak_lr)


@dataclasses.dataclass(frozen=True)
class ScheduleKind:
    """A kind of learning-rate schedule.

    Attributes:
      make: takes the config and the steps per epoch.
      reads: the fields that it reads and some other kind does not. One that reads `warmup_epochs`
        but not `warmup_steps` has its warm-up in epochs.
      lag: epochs by which it is late.
      sets_fall: whether the length of the warm-up also sets how fast the rate falls after it.
    """

    make: Callable[["OptimConfig", int], Schedule]
    reads: tuple[str, ...] = ()
    lag: int = 0
    sets_fall: bool = False


_BY_EPOCH = ("warmup_epochs", "warmup_lr", "min_lr")
SCHEDULES = {
    "epoch_cosine": ScheduleKind(epoch_cosine, _BY_EPOCH, lag=1),
    "epoch_cosine_unlagged": ScheduleKind(functools.partial(epoch_cosine, lag=0), _BY_EPOCH),
    "warmup_cosine": ScheduleKind(warmup_cosine, (*_BY_EPOCH, "warmup_steps")),
    "inverse_sqrt": ScheduleKind(inverse_sqrt, ("warmup_epochs", "warmup_steps"), sets_fall=True),
    "polynomial": ScheduleKind(polynomial, ("min_lr", "power")),
    "constant": ScheduleKind(constant),
}


def make_schedule(config: "OptimConfig", steps_per_epoch: int) -> Schedule:
    """The schedule that `config.schedule` names."""
    return SCHEDULES[config.schedule].make(config, steps_per_epoch)


def _epoch_value(config: "OptimConfig", epochs: int, t: int) -> float:
    peak, warmup = config.peak_lr, config.warmup_epochs
    if t < warmup:
        return config.warmup_lr + t * (peak - config.warmup_lr) / warmup
    return config.min_lr + 0.5 * (peak - config.min_lr) * (1 + math.cos(math.pi * t / epochs))
