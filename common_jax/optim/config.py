"""Optimizer, schedule and length of a run as a section of the config."""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from common_jax.config import FieldError, Section
from common_jax.optim.optimizers import OPTIMIZERS
from common_jax.optim.schedules import SCHEDULES
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

# Lengths in epochs, which their counterparts in updates replace.
REPLACED_BY = {"epochs": "steps", "warmup_epochs": "warmup_steps"}
LONGEST = 1_000_000  # epochs; per-epoch schedules are tables of this length
LARGEST_COUNT = 2**31 - 1
START_SHARE = 0.01  # of a running average, above which its result is not that of the training


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    """Optimizer, schedule and length of a run.

    Attributes:
      epochs: passes over the training set; sets the run's length unless `steps` does.
      steps: total number of updates, in place of `epochs`.
      batch: examples per update, over all devices and micro-batches.
      accumulate: number of micro-batches that an update is split into. Their gradients are
        averaged, so that a loss per token weights a token by the tokens of its micro-batch.
      lr: peak learning rate.
      lr_per: batch size that `lr` is stated for; the peak is lr * batch / lr_per. None: not scaled.
      schedule: "epoch_cosine", constant within an epoch and one epoch late;
        "epoch_cosine_unlagged", the same but not late; "warmup_cosine", per step; "inverse_sqrt",
        per step, at half the peak after four times the warm-up; "polynomial", with exponent `power`
        and no warm-up; or "constant", the peak throughout.
      warmup_epochs: length of the linear warm-up. 0 starts at the peak; "inverse_sqrt" then falls
        as after a warm-up of one update, to half the peak at the fourth.
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
        # A schedule that falls from the warm-up on would fall at once without one.
        example = "" if kind.sets_fall else f", such as --{key}.{name}=0"
        raise ValueError(
            f"{key}.{name}={given} is a warm-up of {warmup} steps, and the run has only {total} "
            f"({key}.{self._length}, {steps_per_epoch} steps per epoch{lag}): give a shorter "
            f"warm-up{example}, or a longer run"
        )

    def warn_of_average(self, steps_per_epoch: int, *, key: str = "config.optim") -> None:
        """Warns, naming fields of the section `key`, if at the end of the run the running average
        still has more than START_SHARE of the weights that the run started from."""
        total = self.total_steps(steps_per_epoch)
        if (left := self.ema**total) <= START_SHARE:
            return
        precision = 10 ** (len(str(total)) + 1)
        enough = math.floor(START_SHARE ** (1 / total) * precision) / precision
        logging.warning(
            "%s.ema=%s averages over more steps than the run has, %d: %.0f %% of the average, "
            "which is what is evaluated, exported and loaded, will be the weights that the run "
            "started from; with --%s.ema=%s, or a longer run, it is at most %.0f %%",
            *(key, self.ema, total, 100 * left, key, enough, 100 * START_SHARE),
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


def replaced_lengths(config: Mapping[str, Any], paths: Iterable[str]) -> dict[str, str]:
    """The lengths in epochs among `paths` that have no effect, since `config`, a nested mapping,
    also gives them in updates; each with the reason."""
    found = {}
    for path in paths:
        *sections, name = path.split(".")
        if sections[-1:] == ["optim"] and name in REPLACED_BY:
            other = REPLACED_BY[name]
            section = functools.reduce(lambda tree, key: tree[key], sections, config)
            schedule = SCHEDULES.get(section["schedule"])  # not checked yet
            read = other == "steps" or (schedule is not None and other in schedule.reads)
            if section[other] is not None and read:
                given = ".".join(("config", *sections, other))
                found[path] = f"{given}={section[other]} is used in its place"
    return found


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
