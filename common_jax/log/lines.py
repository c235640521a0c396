"""A run's log while it trains: what its steps and evaluations report, a step late."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from common_jax.checkpoint import FOLDER
from common_jax.log.clocks import Clock
from common_jax.log.console import Console
from common_jax.metrics import Recorder
from common_jax.workdir import require


class Log:
    """Writes what steps and evaluations report.

    A step is dispatched and not waited for: its report is read when the next step has been
    dispatched, so that the devices always have work. Whoever evaluates or saves reads it first.

    Args:
      recorder: writes the lines.
      console: shows them.
      workdir: the run's folder, which must still be locked by this run when a line is written.
      step: updates done before this start.
      batch: examples per step.
      steps_per_epoch: updates in a pass over the training set.
      patience: steps in a row with a non-finite gradient after which the run stops.
    """

    def __init__(
        self,
        recorder: Recorder,
        console: Console,
        workdir: epath.Path,
        *,
        step: int,
        batch: int,
        steps_per_epoch: int,
        patience: int,
    ):
        self._recorder, self._console, self._workdir = recorder, console, workdir
        self._steps_per_epoch, self._patience = steps_per_epoch, patience
        self._clock = Clock(step, batch)
        self._pending = None  # (step, report, line) of the step that was dispatched last

    def add(self, step: int, report: Mapping[str, jax.Array], *, line: bool) -> None:
        """Takes the report of a step that was just dispatched, and reads that of the step before.

        Args:
          step: its number, from 1.
          report: the second result of `common_jax.step.Step`.
          line: whether it is written to the log.

        Raises:
          FloatingPointError: when too many steps in a row had non-finite gradients.
        """
        self.flush()
        self._pending = (step, report, line)

    def flush(self) -> None:
        """Waits for the step that was dispatched last and reads its report; raises as `add`."""
        if self._pending is None:
            return
        # Taken first, so that a step whose report raises is not read again when the run ends.
        (step, report, line), self._pending = self._pending, None
        skipped_in_row = int(report["skipped_in_row"])  # waits for the step
        self._console.advance(step)
        if line:
            require(self._workdir)  # another run may have taken over the lock
            values = averages(jax.device_get(report))
            self._recorder.write(step, self._epoch(step), values)
            if timing := self._clock.read(step):
                self._recorder.write_timing(step, **timing)
            self._console.show(values | (timing or {}))
        if skipped_in_row >= self._patience:
            raise FloatingPointError(
                f"the last {skipped_in_row} steps up to step {step} had a non-finite loss or "
                f"gradient (config.run.nan_patience={self._patience}). The checkpoints in "
                f"{self._workdir / FOLDER} are from before and stay: lower config.optim.lr or set "
                "config.optim.clip, and start in another workdir"
            )

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of an evaluation, whose time counts for no step."""
        self._recorder.write(step, self._epoch(step), values)
        self._console.show(values)
        self._clock.restart(step)

    def restart_clock(self, step: int) -> None:
        """Leaves the time since the last line out of the timing, such as that of a save."""
        self._clock.restart(step)

    def complete(self) -> bool:
        """Tries again to write lines that could not be written; returns whether all are now."""
        return self._recorder.complete()

    def close(self) -> None:
        """Closes everything; raises OSError where lines still cannot be written."""
        self._console.close()
        self._recorder.close()

    def _epoch(self, step: int) -> float:
        return step / self._steps_per_epoch


def averages(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A line of the log: means over the steps summed, and the counts of skipped steps."""
    counts = {name: int(sums[name]) for name in ("skipped", "skipped_in_row")}
    steps = sums["steps"] or np.nan  # a stretch of skipped steps has no mean
    means = {name: sums[name] / steps for name in sums if name not in (*counts, "steps")}
    return {f"train/{name}": value for name, value in (means | counts).items()}
