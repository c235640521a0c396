"""A run's clocks: of its steps, its saves and its compilations."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

# jax reports this event for every program, whether it compiles or reads it from the cache.
COMPILED = "/jax/core/compile/backend_compile_duration"

_programs = threading.local()  # `count`: programs that this thread has compiled since `_count_them`


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

    def discard(self) -> None:
        """Discards what was timed since the last reading."""
        self._start = None

    def read(self, step: int) -> dict[str, float] | None:
        """Averages since the last reading; None if they were discarded, and for the first stretch,
        which compiles."""
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


@contextlib.contextmanager
def watch_compilation(notice: Callable[[float], None]) -> Iterator[None]:
    """Calls `notice` after the block if the block compiled a program, with the block's seconds.

    A jitted function compiles whenever the shapes of its arguments are new.
    """
    _count_them()
    before, start = _compiled(), time.monotonic()
    yield
    if _compiled() > before:
        notice(time.monotonic() - start)


def _compiled() -> int:
    return getattr(_programs, "count", 0)


@functools.cache  # jax.monitoring cannot remove a listener again
def _count_them() -> None:
    def count(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            _programs.count = _compiled() + 1

    jax.monitoring.register_event_duration_secs_listener(count)
