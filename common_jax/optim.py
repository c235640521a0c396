"""AdamW with decay groups, SGD, and learning-rate schedules."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import jax
import optax
from flax import traverse_util
from jax import numpy as jnp

from common_jax.config import FieldError, Section
from common_jax.ranges import (
    BelowOne,
    Count,
    NonNegative,
    Positive,
    Regex,
    Size,
    key_of,
    within,
)
from common_jax.state import subtrees

# Lengths in epochs, which their counterparts in updates replace.
REPLACED_BY = {"epochs": "steps", "warmup_epochs": "warmup_steps"}
LONGEST = 1_000_000  # epochs; per-epoch schedules are tables of this length
LARGEST_COUNT = 2**31 - 1
# Includes biases with several axes, such as those of layers stacked over experts.
NO_DECAY = r"(.*/)?(bias|up_bias|down_bias)"


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    """Optimizer, schedule and length of a run.

    Attributes:
      epochs: passes over the training set; sets the run's length unless `steps` does.
      steps: total number of updates, in place of `epochs`.
      batch: examples per update, over all devices and micro-batches.
      accumulate: number of micro-batches that an update is split into.
      lr: peak learning rate.
      lr_per: batch size that `lr` is stated for; the peak is lr * batch / lr_per. None: not scaled.
      schedule: "epoch_cosine", constant within an epoch and one epoch late;
        "epoch_cosine_unlagged", the same but not late; "warmup_cosine", per step; "inverse_sqrt",
        per step, after the warm-up; "polynomial", with exponent `power` and no warm-up; or
        "constant", the peak throughout.
      warmup_epochs: length of the linear warm-up.
      warmup_steps: the same in updates, in place of `warmup_epochs`; not for epoch_cosine*.
      warmup_lr: learning rate at the start of the warm-up; never scaled.
      min_lr: learning rate at the end of the cosine or the polynomial; never scaled.
      power: exponent of the polynomial.
      optimizer: what turns the gradient into an update; "sgd" has Nesterov momentum.
      weight_decay: decoupled in AdamW; added to the gradient in SGD.
      b1, b2, eps: AdamW's.
      momentum: SGD's.
      decay_all: whether every parameter decays, including vectors and biases.
      no_decay: regex of further parameter paths that do not decay, including matrices.
      clip: largest global norm of the gradient; None for no clipping.
      ema: decay of the running average of the parameters that is evaluated; 0 for none.
    """

    epochs: Annotated[int, within(1, LONGEST)] = 300
    steps: Size | None = None
    batch: Size = 512
    accumulate: Size = 1
    lr: NonNegative = 5e-4
    lr_per: Size | None = 512
    schedule: Annotated[str, key_of(lambda: SCHEDULES)] = "epoch_cosine"
    warmup_epochs: Count = 20
    warmup_steps: Count | None = None
    warmup_lr: NonNegative = 1e-6
    min_lr: NonNegative = 1e-5
    power: Positive = 2.0
    optimizer: Annotated[str, key_of(lambda: OPTIMIZERS)] = "adamw"
    weight_decay: NonNegative = 0.05
    b1: BelowOne = 0.9
    b2: BelowOne = 0.999
    eps: Positive = 1e-8
    momentum: BelowOne = 0.9
    decay_all: bool = False
    no_decay: Regex = r".*/(pos_embed|cls_token)"
    clip: Positive | None = None
    ema: BelowOne = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.batch % self.accumulate:
            raise FieldError(
                f"batch={self.batch} must be a multiple of accumulate={self.accumulate}"
            )

    @property
    def idle(self) -> dict[str, str]:
        """The fields that are set but have no effect given the others, with the reason; 0 counts
        as not set."""
        why = {
            name: f"{choice}={getattr(self, choice)!r} does not read it"
            for choice, kinds in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS))
            for kind in kinds.values()
            for name in kind.reads
            if name not in kinds[getattr(self, choice)].reads
        }
        if self.decay_all:
            why["no_decay"] = "decay_all=True decays every parameter"
        if not getattr(self, self._warmup):
            why.setdefault("warmup_lr", f"{self._warmup}=0 is no warm-up")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: reason
            for name, reason in why.items()
            if getattr(self, name) and getattr(self, name) != default[name]
        }

    @property
    def rises(self) -> bool:
        """True if the schedule ends at `min_lr` and that is above the peak."""
        return "min_lr" in SCHEDULES[self.schedule].reads and self.min_lr > self.peak_lr

    @property
    def micro_batch(self) -> int:
        """Examples per micro-batch, over all hosts."""
        return self.batch // self.accumulate

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, scaled to the batch size."""
        return self.lr if self.lr_per is None else self.lr * self.batch / self.lr_per

    def total_steps(self, steps_per_epoch: int) -> int:
        """Updates in the whole run."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps

    def check_length(self, steps_per_epoch: int, *, key: str = "config.optim") -> None:
        """Raises ValueError, naming fields of the section `key`, for a run of more steps than a
        32-bit counter counts, or of more epochs than a per-epoch schedule has."""
        length, total = f"{key}.{self._length}", self.total_steps(steps_per_epoch)
        if total > LARGEST_COUNT:
            raise ValueError(
                f"{length} is a run of {total} steps; there can be at most {LARGEST_COUNT}"
            )
        reads, epochs = SCHEDULES[self.schedule].reads, -(-total // steps_per_epoch)
        if "warmup_epochs" in reads and "warmup_steps" not in reads and epochs > LONGEST:
            raise ValueError(
                f"{length} is a run of {epochs} epochs, and {key}.schedule={self.schedule!r} "
                f"has at most {LONGEST}; use 'warmup_cosine'"
            )

    def check_warmup(self, steps_per_epoch: int, *, key: str = "config.optim") -> None:
        """Raises ValueError, naming fields of the section `key`, unless the schedule's warm-up ends
        before the run; a longer warm-up would never reach the peak."""
        kind = SCHEDULES[self.schedule]
        if "warmup_epochs" not in kind.reads:
            return
        name, total = self._warmup, self.total_steps(steps_per_epoch)
        given = getattr(self, name)
        warmup = given if name == "warmup_steps" else given * steps_per_epoch
        late = kind.lag * steps_per_epoch
        if warmup + late < total or warmup == 0:
            return
        lag = f"; schedule={self.schedule!r} is {late} steps late" if late else ""
        raise ValueError(
            f"{key}.{name}={given} is a warm-up of {warmup} steps, and the run has only {total} "
            f"({key}.{self._length}, {steps_per_epoch} steps per epoch{lag}): give a shorter "
            f"warm-up, such as --{key}.{name}=0, or a longer run"
        )

    @property
    def _warmup(self) -> str:
        """The field that sets the length of the warm-up."""
        by_steps = "warmup_steps" in SCHEDULES[self.schedule].reads
        return "warmup_epochs" if self.warmup_steps is None or not by_steps else "warmup_steps"

    @property
    def _length(self) -> str:
        """The field that sets the run's length, with its value."""
        return f"epochs={self.epochs}" if self.steps is None else f"steps={self.steps}"

    def total_warmup(self, steps_per_epoch: int) -> int:
        """Updates in the warm-up, for per-step schedules."""
        in_epochs = self.warmup_epochs * steps_per_epoch
        return in_epochs if self.warmup_steps is None else self.warmup_steps


def idle_optim(config: Any, *, pipeline: bool) -> dict[str, str]:
    """`OptimConfig.idle` of `config.optim`, or of every recipe's in a pipeline, by field path."""
    recipes = {f"recipes.{name}.optim": one.optim for name, one in config.recipes.items()}
    sections = recipes if pipeline else {"optim": config.optim}
    return {
        f"{section}.{name}": why
        for section, optim in sections.items()
        for name, why in optim.idle.items()
    }


Recipe = TypeVar("Recipe")  # a dataclass with a field `optim`


def scale_lengths(recipes: Mapping[str, Recipe], scale: float) -> dict[str, Recipe]:
    """Returns the recipes with the length of each run and of its warm-up multiplied by `scale`.

    Lengths are rounded, to one epoch or update at least; a warm-up still ends before the run.

    Raises:
      ValueError: if the scale is not positive.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale:g} must be positive, such as 0.1 for a tenth of the length")

    def times(length: int, least: int) -> int:
        return max(least, round(length * scale))

    def scaled(optim: OptimConfig) -> OptimConfig:
        epochs, lag = times(optim.epochs, 1), SCHEDULES[optim.schedule].lag
        steps = None if optim.steps is None else times(optim.steps, 1)
        warmup_steps = None if optim.warmup_steps is None else times(optim.warmup_steps, 0)
        if steps is not None and warmup_steps is not None:
            warmup_steps = min(warmup_steps, steps - 1)
        return dataclasses.replace(
            optim,
            epochs=epochs,
            steps=steps,
            warmup_epochs=min(times(optim.warmup_epochs, 0), max(0, epochs - 1 - lag)),
            warmup_steps=warmup_steps,
        )

    return {
        name: dataclasses.replace(recipe, optim=scaled(recipe.optim)) if scale != 1 else recipe
        for name, recipe in recipes.items()
    }


Schedule = Callable[[jax.Array], jax.Array]


def epoch_cosine(config: OptimConfig, steps_per_epoch: int, *, lag: int = 1) -> Schedule:
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


def warmup_cosine(config: OptimConfig, steps_per_epoch: int) -> Schedule:
    """Linear from warmup_lr to the peak over the warm-up, then half a cosine to min_lr, per
    step."""
    config.check_warmup(steps_per_epoch)
    warmup, total = config.total_warmup(steps_per_epoch), config.total_steps(steps_per_epoch)
    return optax.warmup_cosine_decay_schedule(
        config.warmup_lr if warmup else config.peak_lr, config.peak_lr, warmup, total, config.min_lr
    )


def inverse_sqrt(config: OptimConfig, steps_per_epoch: int) -> Schedule:
    """Linear from 0 to the peak over W steps, then the peak times sqrt(W / s) (Vaswani et al. 2017,
    section 5.3)."""
    warmup, peak = max(config.total_warmup(steps_per_epoch), 1), config.peak_lr

    def rate(step: jax.Array) -> jax.Array:
        done = (jnp.asarray(step) + 1).astype(jnp.float32)
        return peak * jnp.minimum(done / warmup, jnp.sqrt(warmup / done))

    return rate


def polynomial(config: OptimConfig, steps_per_epoch: int) -> Schedule:
    """(peak - min_lr) (1 - s / S)^power + min_lr at step s of S."""
    total = config.total_steps(steps_per_epoch)
    return optax.polynomial_schedule(config.peak_lr, config.min_lr, config.power, total)


def constant(config: OptimConfig, steps_per_epoch: int) -> Schedule:
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
    """

    make: Callable[[OptimConfig, int], Schedule]
    reads: tuple[str, ...] = ()
    lag: int = 0


_BY_EPOCH = ("warmup_epochs", "warmup_lr", "min_lr")
SCHEDULES = {
    "epoch_cosine": ScheduleKind(epoch_cosine, _BY_EPOCH, lag=1),
    "epoch_cosine_unlagged": ScheduleKind(functools.partial(epoch_cosine, lag=0), _BY_EPOCH),
    "warmup_cosine": ScheduleKind(warmup_cosine, (*_BY_EPOCH, "warmup_steps")),
    "inverse_sqrt": ScheduleKind(inverse_sqrt, ("warmup_epochs", "warmup_steps")),
    "polynomial": ScheduleKind(polynomial, ("min_lr", "power")),
    "constant": ScheduleKind(constant),
}


def make_schedule(config: OptimConfig, steps_per_epoch: int) -> Schedule:
    """The schedule that `config.schedule` names."""
    return SCHEDULES[config.schedule].make(config, steps_per_epoch)


def make_optimizer(
    config: OptimConfig, *, clip_depth: int = 0
) -> optax.GradientTransformationExtraArgs:
    """AdamW or SGD, which map the clipped gradient to a direction u. If `finite`, an argument of
    its update, is False, the optimizer state does not change and u is meaningless.

    The learning rate is applied outside: the train step computes p <- p - lr u, with the rate at
    the run's step rather than at the optimizer's own count, which skipped steps do not advance.

        g <- g min(1, clip / |g|)
        adamw:  u = m / (sqrt(v) + eps) + weight_decay p
        sgd:    g <- g + weight_decay p;  t <- momentum t + g;  u = g + momentum t

    Vectors and biases do not decay, unless `config.decay_all`; see `decay_mask`.
    """
    mask = None if config.decay_all else lambda params: decay_mask(params, config.no_decay)
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    clip = [clip_by_norm(config.clip, clip_depth)] if config.clip is not None else []
    kind = OPTIMIZERS[config.optimizer]
    optimizer = optax.chain(*clip, *kind.make(config, decay))
    return optimizer if kind.skips else _skipping(optimizer)


def _adamw(
    config: OptimConfig, decay: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, ...]:
    return _adam(config.b1, config.b2, config.eps), decay


def _sgd(
    config: OptimConfig, decay: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, ...]:
    return decay, optax.trace(config.momentum, nesterov=True)


@dataclasses.dataclass(frozen=True)
class OptimizerKind:
    """A kind of optimizer.

    Attributes:
      make: takes the config and the weight decay; returns both in the order they are chained.
      reads: the fields that it reads and some other kind does not.
      skips: whether its update takes `finite` itself and then keeps its state. Any other is
        wrapped: optax would not pass `finite` on, and one NaN would stay in its state for ever.
    """

    make: Callable[..., tuple[optax.GradientTransformation, ...]]
    reads: tuple[str, ...] = ()
    skips: bool = False


OPTIMIZERS = {
    "adamw": OptimizerKind(_adamw, ("b1", "b2", "eps"), skips=True),
    "sgd": OptimizerKind(_sgd, ("momentum",)),
}


def _skipping(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its state does not change unless `finite`."""

    def update(gradient: Any, state: Any, params: Any = None, *, finite: Any = True):
        direction, new = optimizer.update(gradient, state, params)
        return direction, keep(finite, new, state)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, but with the direction computed from the moments that are kept."""
    adam = _skipping(optax.scale_by_adam(b1, b2, eps))

    def update(gradient: Any, state: Any, params: Any = None, *, finite: Any = True):
        # optax computes the direction from the moments before `keep`, and XLA for CPU recomputes
        # those from the old moments. Since the kept moments overwrite the old ones in place, XLA
        # then has to copy the old ones first, which takes twice the size of the parameters.
        state = adam.update(gradient, state, params, finite=finite)[1]
        mean = optax.tree.bias_correction(state.mu, b1, state.count)
        square = optax.tree.bias_correction(state.nu, b2, state.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def keep(finite: jax.Array | bool, new: Any, old: Any) -> Any:
    """The new tree if `finite`, else the old one. Selects element by element, since a conditional
    would hold a copy for each branch."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def clip_by_norm(largest: float, depth: int) -> optax.GradientTransformation:
    """Clips each subtree `depth` keys deep separately to the global norm `largest`; a `depth` of 0
    clips the whole gradient by one norm."""

    whole = optax.clip_by_global_norm(largest)
    if not depth:
        return whole

    def clip(gradient: Any, params: Any) -> Any:
        parts = subtrees(gradient, depth)
        clipped = {path: whole.update(part, optax.EmptyState())[0] for path, part in parts.items()}
        return traverse_util.unflatten_dict(clipped)

    return optax.stateless(clip)


def decay_mask(params: Any, no_decay: str) -> Any:
    """True where weight decay applies: everywhere but one-axis arrays and biases. Scalars decay.

    Args:
      params: nested dict.
      no_decay: regex of further paths `a/b/c` without decay, such as class token and position
        embeddings.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    mask = {
        path: leaf.ndim != 1
        and not re.fullmatch(NO_DECAY, path)
        and not re.fullmatch(no_decay, path)
        for path, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(mask, sep="/")


def _epoch_value(config: OptimConfig, epochs: int, t: int) -> float:
    peak, warmup = config.peak_lr, config.warmup_epochs
    if t < warmup:
        return config.warmup_lr + t * (peak - config.warmup_lr) / warmup
    return config.min_lr + 0.5 * (peak - config.min_lr) * (1 + math.cos(math.pi * t / epochs))
