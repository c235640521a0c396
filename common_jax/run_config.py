"""Config of how a run logs, evaluates and saves, and the steps at which each is due."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import ml_collections
from etils import epath

from common_jax import hosts
from common_jax.config import FieldError, Section, unfreeze
from common_jax.optim import OptimConfig
from common_jax.ranges import Name, Positive, Size, one_of

FAILED_SAVE = ("stop", "go_on")


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """How a run logs, evaluates and saves.

    Attributes:
      log_every: steps per line of metrics.jsonl, which averages over them.
      eval_every: epochs between evaluations; the last step is always evaluated.
      checkpoint_every: epochs between checkpoints; the last step is always saved.
      checkpoint_minutes: minutes since the last checkpoint after which another one is written, at
        the next log line; None for never.
      on_failed_save: "stop" ends the run when a checkpoint or a log line cannot be written, "go_on"
        warns and tries again at the next one. The final ones must succeed either way.
      keep: number of newest checkpoints to keep.
      best: metric whose best value, of losses the lowest, also keeps its checkpoint; None for
        none.
      average_last: number of per-epoch checkpoints, counted back from the last step, whose mean
        parameters are evaluated at the end and loaded from the last checkpoint; 1 uses the last
        step's own parameters. The mean is updated during training, so the checkpoints need not be
        kept.
      nan_patience: consecutive steps with a non-finite loss or gradient after which the run stops.
      profile: first and last step to trace with jax.profiler into WORKDIR/profile; () for none.
      compilation_cache: folder for compiled programs, reused by later runs; None for none.
      wandb: Weights & Biases project that the scalars are also logged to; None for none.
    """

    log_every: Size = 50
    eval_every: Size = 1
    checkpoint_every: Size = 1
    checkpoint_minutes: Positive | None = 30.0
    on_failed_save: Annotated[str, one_of(*FAILED_SAVE)] = "stop"
    keep: Size = 2
    best: Name | None = "test/accuracy"
    average_last: Size = 1
    nan_patience: Size = 10
    profile: tuple[Size, ...] = ()
    compilation_cache: Name | None = "~/.cache/modular_jax"
    wandb: Name | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.profile and (len(self.profile) != 2 or self.profile[0] > self.profile[1]):
            raise FieldError(f"profile={self.profile} must be () or (first step, last step)")


@dataclasses.dataclass(frozen=True)
class Due:
    """What is due after each step. After the last step, everything is."""

    run: RunConfig
    steps_per_epoch: int
    total: int

    def line(self, step: int) -> bool:
        return step == self.total or step % self.run.log_every == 0

    def evaluation(self, step: int) -> bool:
        return self._epochs(step, self.run.eval_every)

    def checkpoint(self, step: int) -> bool:
        return self._epochs(step, self.run.checkpoint_every)

    @property
    def averaged(self) -> tuple[int, ...]:
        """The steps whose parameters are averaged, ascending; () without averaging.

        Leaves out checkpoints written after checkpoint_minutes or on a request to stop: their
        timing depends on the machine, and the result must not.
        """
        if self.run.average_last == 1:
            return ()
        stride = self.run.checkpoint_every * self.steps_per_epoch
        return (*range(stride, self.total, stride)[1 - self.run.average_last :], self.total)

    def whole_average(self, step: int) -> bool:
        """Whether the average in the state at `step`, if it has one, is ready to be evaluated."""
        return not self.averaged or step == self.total

    def warn_of_unscored(self) -> None:
        """Warns if `run.best` is chosen among a few checkpoints only, because the others have no
        evaluation and some evaluations have no checkpoint."""
        evaluated, saved = self.run.eval_every, self.run.checkpoint_every
        if self.run.best is not None and saved % evaluated and evaluated % saved:
            logging.warning(
                "config.run.best=%r is chosen only among every %d epochs and the last step, where "
                "config.run.eval_every=%d and config.run.checkpoint_every=%d meet: make one of "
                "them a multiple of the other",
                *(self.run.best, math.lcm(evaluated, saved), evaluated, saved),
            )

    def check_average(self, optim: OptimConfig, *, title: str, key: str) -> None:
        """Raises ValueError for an average over more checkpoints than there will be, or one
        combined with a best checkpoint or a running average.

        Args:
          optim: the run's optimizer settings.
          title: the task's title.
          key: config path of the section that holds `optim`.
        """
        if self.run.average_last == 1:
            return
        last = f"config.run.average_last={self.run.average_last}"
        if self.run.best is not None:
            raise ValueError(
                f"{last} makes the average the run's result, and config.run.best={self.run.best!r} "
                "would choose a single checkpoint; set --config.run.best=None"
            )
        if optim.ema:
            raise ValueError(
                f"{last} and {key}.optim.ema={optim.ema} are two averages of the same parameters; "
                f"set the first to 1, or --{key}.optim.ema=0"
            )
        if len(self.averaged) < self.run.average_last:
            raise ValueError(
                f"{last} is more than the {len(self.averaged)} checkpoints of {title}: "
                f"one every {self.run.checkpoint_every} epochs "
                f"(config.run.checkpoint_every) of {self.steps_per_epoch} steps and one at its "
                f"last step, {self.total}; lower it, or save more often"
            )

    def _epochs(self, step: int, epochs: int) -> bool:
        return step == self.total or step % (epochs * self.steps_per_epoch) == 0


PIPELINE = "pipeline"  # the phase or stage of a config that has a recipe for each of its runs


def apply_recipe(
    config: ml_collections.ConfigDict,
    recipes: Mapping[str, Any],
    *,
    kind: str,
    bare: Sequence[str] = (),
) -> ml_collections.ConfigDict:
    """Fills in the recipe of a run; a pipeline gets all of them under `config.recipes`.

    Args:
      config: it is modified and returned.
      recipes: by the value of `kind`: dataclasses whose fields are sections of the config.
      kind: the field that says which run it is, "phase" or "stage".
      bare: values of `kind` that need no recipe.

    Raises:
      ValueError: if there is no recipe for the value.
    """
    run = config[kind]
    if run == PIPELINE:
        for name in (field.name for field in dataclasses.fields(next(iter(recipes.values())))):
            del config[name]
        config.recipes = unfreeze(dict(recipes))
    elif run not in bare:
        if run not in recipes:
            choices = [*recipes, PIPELINE, *bare]
            raise ValueError(f"{kind}={run!r} has no recipe here; choose one of {choices}")
        for name, section in unfreeze(recipes[run]).items():
            config[name] = section
    return config


def compare_data(
    due: Due,
    optim: OptimConfig,
    workdir: epath.Path,
    line: Mapping[str, Any] | None,
    *,
    start: int,
) -> None:
    """Warns if an epoch has another number of steps than in the last line of the log, if any.

    Raises:
      ValueError: in all processes, if an average over the last checkpoints has begun, which would
        then be over others.
    """
    failure = None
    epoch, step = (0, 0) if line is None else (line.get("epoch"), line["step"])
    if epoch and round(step / due.steps_per_epoch, 6) != epoch:
        before = max(1, round(step / epoch))
        logging.warning(
            "%s: the training set has another size than before: an epoch has %d steps, and had "
            "%d. The order of the examples changes, and so does every length given in epochs",
            *(workdir, due.steps_per_epoch, before),
        )
        old = dataclasses.replace(due, steps_per_epoch=before, total=optim.total_steps(before))
        if start >= min((*due.averaged[:1], *old.averaged[:1]), default=start + 1):
            failure = ValueError(
                f"{workdir}: the average over the last {due.run.average_last} checkpoints "
                f"(config.run.average_last) has begun, and with {due.steps_per_epoch} steps per "
                f"epoch instead of {before} it would be over others. Restore the training set, or "
                "give another --workdir"
            )
    elsewhere = ValueError(f"{workdir} cannot be resumed; another process says why")
    hosts.raise_everywhere(failure, elsewhere)
