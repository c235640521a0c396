"""The end of a save, which all processes of a run reach together, even if one of them failed."""

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterator

import jax

from common_jax import hosts

# Seconds that orbax waits for the other processes in a save, its own default. A process that fails
# says so long before; this is for one that hangs, as on storage that does not answer.
LONGEST = 1200
REMINDER = 30  # seconds between lines in the log while a save takes long
# orbax's names for the two places where all processes wait for each other in a save: before process
# 0 commits what they have written, and after that.
PLACES = ("async_write_complete", "async_commit_complete")

_saves = itertools.count()  # the same in every process, since all begin the same saves


class Meeting:
    """Where the processes meet in a save, and learn whether it has failed in any of them.

    With orbax alone, a process whose part fails does not arrive, so that the others wait for it
    until a timeout, which then looks like the reason. Here it publishes the reason and arrives all
    the same, and the others fail with that reason. By then no process is writing any longer.
    """

    def __init__(self) -> None:
        self._save, self._missed = "", []

    def begin(self) -> None:
        """Begins a save. All processes must call this at the same point."""
        self._save, self._missed = f"save {next(_saves)}", list(PLACES)

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """orbax's `barrier_sync_fn`, which its threads call. Raises OSError if a process failed."""
        if jax.process_count() == 1:
            return
        place = next((place for place in self._missed if place in key), None)
        if place is None:  # not a part of a commit
            hosts.meet(key, timeout_ms / 1000)
            return
        self._missed.remove(place)
        hosts.meet(f"{self._save} {place}", timeout_ms / 1000)
        if reason := self.reason():
            raise OSError(reason)

    def fail(self, error: BaseException) -> None:
        """Publishes why this process's part failed, and waits for the others where it did not get
        to. A thread of orbax calls this."""
        self.publish(error)
        while self._missed and jax.process_count() > 1:
            # It fails if the others have waited too long; they have their reason then.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                hosts.meet(f"{self._save} {self._missed.pop(0)}", LONGEST)

    def publish(self, error: BaseException) -> None:
        """Makes `error` the reason why the save failed, unless there is one already."""
        if jax.process_count() > 1:
            hosts.publish(self._save, f"process {jax.process_index()}: {error}")

    def reason(self) -> str | None:
        """The first reason that a process has published in this save; None in a single process."""
        return hosts.published(self._save) if jax.process_count() > 1 else None

    @contextlib.contextmanager
    def patient(self, step: int | None) -> Iterator[None]:
        """Within this block, which waits for the save, the log says so every REMINDER seconds: a
        line of process 0, or once a process has failed, a warning of all."""
        ended = threading.Event()

        def remind() -> None:
            waited = 0
            while not ended.wait(REMINDER):
                waited += REMINDER
                self._remind(step, waited)

        thread = threading.Thread(target=remind, name="save_reminder", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _remind(self, step: int | None, waited: int) -> None:
        reason = None
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator does not answer
            reason = self.reason()
        if reason is not None:
            logging.warning(
                "the checkpoint of step %s has failed (%s); waiting until the other processes have "
                "written their parts, %d s so far",
                step,
                reason,
                waited,
            )
            return
        others = "; waiting for the other processes" if jax.process_count() > 1 else ""
        logging.info(
            "the checkpoint of step %s is still being written%s, %d s so far", step, others, waited
        )
