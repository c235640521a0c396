"""A run's clocks: one times its steps, one its saves."""

import time


class Clock:
    """Wall time of training steps; `restart` excludes evaluations and saves.

    Args:
      step: updates done before this start.
      batch: examples per step.
    """

    def __init__(self, step: int, batch: int):
        self._batch = batch
        self._step, self._start = step, None

    def restart(self, step: int) -> None:
        """Restarts the clock at this step."""
        self._step, self._start = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float] | None:
        """Averages since the last reading; None for the first stretch, which compiles."""
        now, before, start = time.perf_counter(), self._step, self._start
        # Even if nothing is returned: the next stretch begins here.
        self.restart(step)
        if start is None or step == before:
            return None
        seconds = (now - start) / (step - before)
        return {"examples_per_second": self._batch / seconds, "milliseconds": seconds * 1e3}


class Alarm:
    """Rings once `minutes` have passed; never, if None."""

    def __init__(self, minutes: float | None):
        self._minutes = minutes
        self.restart()

    def restart(self) -> None:
        """Starts counting from now."""
        self._start = time.monotonic()

    def rings(self) -> bool:
        """True once `minutes` have passed."""
        return self._minutes is not None and time.monotonic() - self._start > 60 * self._minutes
