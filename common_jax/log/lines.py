"""A run's log during training: the metrics of its steps, one step late, and of its evaluations."""

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
    """Writes the metrics that steps and evaluations report.

    A step is dispatched without waiting for it. Its report is read only once the next step has been
    dispatched, so that the devices always have work. Call `flush` before evaluating or saving.

    Args:
      recorder: writes the lines.
      console: shows them.
      workdir: the run's folder; this run must still hold its lock whenever a line is written.
      step: updates done before this start.
      batch: examples per step.
      steps_per_epoch: updates in a pass over the training set.
      patience: consecutive steps with a non-finite loss or gradient after which the run stops.
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
        self._pending = None  # (step, report, line) of the last dispatched step

    def add(self, step: int, report: Mapping[str, jax.Array], *, line: bool) -> None:
        """Adds the report of a step that was just dispatched, and reads the one of the step before.

        Args:
          step: the step's number, from 1.
          report: the second result of `common_jax.step.Step`.
          line: whether to write it to the log.

        Raises:
          FloatingPointError: if too many consecutive steps had a non-finite loss or gradient.
        """
        self.flush()
        self._pending = (step, report, line)

    def flush(self) -> None:
        """Waits for the last dispatched step and reads its report; raises as `add`."""
        if self._pending is None:
            return
        # Cleared first, so that a report that raises is not read again when the run ends.
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
                f"gradient (config.run.nan_patience={self._patience}). Earlier checkpoints are "
                f"kept in {self._workdir / FOLDER}: lower config.optim.lr or set "
                "config.optim.clip, and start in another workdir"
            )

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of an evaluation, and excludes its time from the timing of steps."""
        self._recorder.write(step, self._epoch(step), values)
        self._console.show(values)
        self._clock.restart(step)

    def add_compilation(self, step: int, seconds: float) -> None:
        """Shows that this step compiled. The steps since the last line are not timed: earlier ones
        ran during the compilation, so it cannot be subtracted."""
        self._console.compiled(step, seconds)
        self._clock.discard()

    def restart_clock(self, step: int) -> None:
        """Excludes the time since the last line from the timing, such as that of a save."""
        self._clock.restart(step)

    def complete(self) -> bool:
        """Retries lines that could not be written; returns True if none are left."""
        return self._recorder.complete()

    def close(self) -> None:
        """Closes everything; raises OSError if some lines still cannot be written."""
        self._console.close()
        self._recorder.close()

    def _epoch(self, step: int) -> float:
        return step / self._steps_per_epoch


def averages(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The content of a log line: means over the summed steps, and the counts of skipped steps."""
    counts = {name: int(sums[name]) for name in ("skipped", "skipped_in_row")}
    steps = sums["steps"] or np.nan  # if all steps were skipped, there is no mean
    means = {name: sums[name] / steps for name in sums if name not in (*counts, "steps")}
    return {f"train/{name}": value for name, value in (means | counts).items()}
