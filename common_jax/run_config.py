"""How a run logs, evaluates and saves, and after which steps."""

import dataclasses
from typing import Annotated

from common_jax.config import FieldError, Section
from common_jax.optim import OptimConfig
from common_jax.ranges import Name, Positive, Size, one_of

FAILED_SAVE = ("stop", "go_on")


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """How a run logs, evaluates and saves.

    Attributes:
      log_every: steps per line of metrics.jsonl, which has their averages.
      eval_every: epochs between evaluations; the last step is always evaluated.
      checkpoint_every: epochs between checkpoints; the last step is always saved.
      checkpoint_minutes: time since the last checkpoint after which a further one is written, at
        the next line of the log; None for never.
      on_failed_save: "stop" ends the run when a checkpoint or a line of the log could not be
        written, "go_on" warns and tries again at the next one. The last ones must be written.
      keep: newest checkpoints that stay.
      best: metric whose highest value keeps its checkpoint as well; None for none.
      average_last: checkpoints by epoch, counted back from the last step, whose parameters' mean is
        evaluated at the end and loaded from the last checkpoint; 1 for the last step's own. They
        need not stay: the mean is updated while the run trains.
      nan_patience: steps in a row with a non-finite gradient after which the run stops.
      profile: first and last step to trace with jax.profiler into WORKDIR/profile; () for none.
      compilation_cache: folder of compiled programs that later runs reuse; None for none.
      wandb: project of Weights & Biases that gets the scalars too; None for none.
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
    """What a run does after which steps. After the last one it does all."""

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
        """The steps whose parameters are averaged, ascending; () if the last is not averaged.

        Checkpoints by the clock or after a request to stop are not among them: when those are
        written depends on the machine, and the result must not.
        """
        if self.run.average_last == 1:
            return ()
        stride = self.run.checkpoint_every * self.steps_per_epoch
        return (*range(stride, self.total, stride), self.total)[-self.run.average_last :]

    def whole_average(self, step: int) -> bool:
        """Whether the average in the state at `step`, if it has one, is one to evaluate."""
        return not self.averaged or step == self.total

    def check_average(self, optim: OptimConfig, *, title: str, key: str) -> None:
        """Raises ValueError for an average of more checkpoints than there will be, or one beside a
        best checkpoint or a running average.

        Args:
          optim: the run's, in the config's section `key`.
          title: of the task.
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
                f"{last} is more than {title} has checkpoints, {len(self.averaged)}: "
                f"one every {self.run.checkpoint_every} epochs "
                f"(config.run.checkpoint_every) of {self.steps_per_epoch} steps and one at its "
                f"last step, {self.total}; lower it, or save more often"
            )

    def _epochs(self, step: int, epochs: int) -> bool:
        return step == self.total or step % (epochs * self.steps_per_epoch) == 0
