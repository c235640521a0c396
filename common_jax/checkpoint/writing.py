"""A run's own checkpoints: written while it trains, and read when it resumes."""

import contextlib
import dataclasses
import errno
import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from common_jax import hosts
from common_jax.checkpoint.belonging import FOLDER, finished_steps
from common_jax.checkpoint.contents import (
    FAILURES,
    MARK,
    Outline,
    check_written,
    outline,
    read_mark,
)
from common_jax.checkpoint.reading import AVERAGE, absolute, refuse_pattern
from common_jax.state import TrainState
from common_jax.workdir import keep_identity, read_identity

FULL = (errno.ENOSPC, errno.EDQUOT)


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are whole."""


class Checkpoints:
    """The checkpoints of one run: saves asynchronously, keeps the newest `keep` and the best one.

    A save counts once the written files have been checked, in orbax's thread: before that the
    folder has no marker, and no older checkpoint is deleted for it.

    All processes of a run must call every method at the same place; all raise where one fails.

    Args:
      workdir: the run's folder; checkpoints go to its subfolder `checkpoints`.
      keep: how many of the newest stay.
      best: name of the metric whose highest value keeps its checkpoint, or None.
      on_failed: "stop" raises SaveError when a save has failed, "go_on" warns.
      run_id: of the run's run.json, kept in every checkpoint; None for checkpoints of no run.
      foreign: step -> reason, of checkpoints there that are not the run's: they are renamed to
        foreign_STEP.

    Raises:
      ValueError: for a folder that no checkpoint can be written to, see `refuse_pattern`.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep: int,
        best: str | None,
        on_failed: str = "stop",
        run_id: str | None = None,
        foreign: Mapping[int, str] | None = None,
    ):
        refuse_pattern(workdir, "workdir")
        self.folder = absolute(workdir) / FOLDER
        self._keep, self._best, self._on_failed, self._run_id = keep, best, on_failed, run_id
        self._scores: dict[int, float] = {}  # of steps evaluated after they were saved
        self._step = None  # of the save that is under way
        self._arrays: dict[str, Outline] = {}  # what it writes
        self._texts: dict[str, Any] = {}
        for step, why in (foreign or {}).items():
            logging.warning("checkpoint %s is put aside: %s", self.folder / str(step), why)
        # Before orbax looks: it would take a foreign step for the newest, and delete ours.
        self._foreign = frozenset(foreign or ())
        self._put_aside(self._foreign, "foreign")
        self._manager = self._open()

    def save(
        self,
        state: TrainState,
        *,
        step: int,
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts to write `state`; returns when the arrays are copied, before they are on disk.

        Raises:
          ValueError: when there are metrics and the one that decides which is best is missing.
          SaveError: when this save or the one before fails, unless `on_failed` is "go_on".
        """
        if metrics and self._best is not None and self._best not in metrics:
            raise ValueError(
                f"config.run.best={self._best!r} is none of the metrics {sorted(metrics)}; "
                "None keeps no best checkpoint"
            )
        arrays = {"params": state.params, "trainer": _trainer(state)}
        if state.ema is not None:
            arrays[AVERAGE] = state.ema
        texts = {"config": dict(config)}
        if self._run_id is not None:
            texts[MARK] = {"id": self._run_id, "step": step}
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in texts.items()}
        self._attempt(self._finish)
        self._step, self._texts = step, texts
        self._arrays = {name: outline(tree) for name, tree in arrays.items()}
        self._attempt(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(**items),
                metrics=dict(metrics) if metrics else None,
                force=True,  # never left out in silence
            )
        )

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives the metrics of a checkpoint that was saved before it was evaluated."""
        if self._best is not None and self._best in metrics:
            self._scores[step] = metrics[self._best]

    def restore_latest(self, abstract: TrainState) -> TrainState:
        """The newest state that can be read, on the shardings of `abstract`.

        A checkpoint that cannot be read is named in a warning, and the one before it is tried. Once
        one can be read, the damaged ones are renamed to damaged_STEP.

        Raises:
          ValueError: when none can be read.
        """
        # Another process may still see what the first has put aside.
        steps, damaged = sorted(set(finished_steps(self.folder)) - self._foreign), []
        # The newest that any process sees: on shared storage one may see a folder later.
        while (step := int(hosts.agree(max(set(steps) - set(damaged), default=-1))[0])) >= 0:
            state, failure = None, None
            try:
                state = self._restore(step, abstract)
            except FAILURES as error:
                failure = error
            if not hosts.agree(failure is not None).any():
                if damaged:
                    self._manager.close()
                    self._put_aside(damaged, "damaged")
                    self._manager = self._open()
                return state
            why = failure or "another process says why"
            logging.warning("checkpoint %s cannot be read (%s)", self.folder / str(step), why)
            damaged.append(step)
        raise ValueError(
            f"none of the checkpoints {steps} in {self.folder} can be read; the warnings above say "
            "why. Move the folder away to start from scratch"
        )

    def wait(self) -> None:
        """Waits until every save is on disk and checked; raises SaveError when the last failed."""
        self._attempt(self._finish, last=True)

    def close(self) -> None:
        """Waits for saves and ends orbax's threads; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def abandon(self) -> None:
        """After a failure of the run: finishes a save that is under way, if no other process is
        needed for it, and raises nothing."""
        if jax.process_count() == 1:
            with contextlib.suppress(*FAILURES):
                self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0:
            _remove_unfinished(self.folder)
        hosts.agree(0)  # nobody continues before
        policies = [checkpoint_managers.LatestN(self._keep)]
        if self._best is not None:
            policies.append(_Best(self._metric))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._look),
        )
        return _Manager(self.folder, options=options)

    def _look(self) -> None:
        """Raises OSError unless a save was written as intended. orbax calls it in its thread, in
        the process that then writes the marker."""
        name = str(self._step)
        # In a bucket, where nothing can be renamed, a step is written in place.
        places = [
            path
            for path in self.folder.iterdir()
            if path.name == name or path.name.startswith(f"{name}.orbax-checkpoint-tmp")
        ]
        if len(places) != 1:
            raise OSError(f"{self.folder} has {[path.name for path in places]} for step {name}")
        check_written(places[0], self._arrays, self._texts)

    def _finish(self) -> None:
        """Waits for the save that is under way; raises if it has failed, or if the folder no longer
        belongs to the run."""
        self._manager.wait_until_finished()
        if self._step is None or jax.process_index() != 0:
            return
        if self._step not in finished_steps(self.folder):
            raise OSError("it is not there")
        if self._run_id is not None:
            found = read_identity(self.folder.parent)
            if found is None or found.id != self._run_id:
                raise OSError(
                    f"run.json beside it is {'gone' if found is None else 'of another run'}, so "
                    "the workdir was deleted or replaced"
                )

    def _attempt(self, action: Callable[[], Any], *, last: bool = False) -> None:
        """Runs an action that raises if a save has failed, in this process or another.

        A manager whose save has failed stumbles over the unfinished one, so it is replaced.
        """
        failure = None
        try:
            action()
        except FAILURES as error:
            failure = error
        if not hosts.agree(failure is not None).any():
            return
        failed, self._step = self._step, None
        with contextlib.suppress(*FAILURES):
            self._manager.close()
        self._manager = self._open()
        kept = finished_steps(self.folder)
        message = (
            f"the checkpoint of step {failed} could not be written to {self.folder} "
            f"({failure or 'another process says why'}); "
            + (f"the newest whole one is of step {kept[-1]}" if kept else "there is none before it")
        )
        if last or self._on_failed == "stop":
            full = isinstance(failure, OSError) and failure.errno in FULL
            full = full or "No space left" in str(failure) or "quota exceeded" in str(failure)
            advice = "Make room, and start" if full else "Start"
            raise SaveError(
                f"{message}. {advice} the same command again: it resumes from there"
            ) from failure
        logging.warning("%s; the run continues", message)

    def _restore(self, step: int, abstract: TrainState) -> TrainState:
        items = {
            "params": ocp.args.StandardRestore(abstract.params),
            "trainer": ocp.args.StandardRestore(_trainer(abstract)),
        }
        if abstract.ema is not None:
            items[AVERAGE] = ocp.args.StandardRestore(abstract.ema)
        read_mark(self.folder / str(step))  # raises where it is damaged
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        average = restored[AVERAGE] if abstract.ema is not None else None
        return TrainState(params=restored["params"], ema=average, **restored["trainer"])

    def _put_aside(self, steps: Collection[int], why: str) -> None:
        """Renames folders to WHY_STEP: their content is kept, and the run can save these steps
        again."""
        for step in steps if jax.process_index() == 0 else ():
            _move(self.folder / str(step), self.folder / f"{why}_{step}")
        hosts.agree(0)  # nobody continues before

    def _metric(self, checkpoint: Any) -> float:
        if checkpoint.metrics is not None and self._best in checkpoint.metrics:
            return checkpoint.metrics[self._best]
        return self._scores.get(checkpoint.step, float("-inf"))


class _Manager(ocp.CheckpointManager):
    """orbax's manager, which leaves the question whether to stop to the train loop."""

    def reached_preemption(self, step: int) -> bool:
        """Always False. orbax would ask from a thread and by the run's step, where `hosts.check`
        counts its questions: the processes would miss the point on which they agreed."""
        del step
        return False


@dataclasses.dataclass(frozen=True)
class _Best(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of the highest finite value; of equal ones the earliest."""

    value: Callable[[Any], float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """True for each checkpoint that is kept."""
        values = [self.value(checkpoint) for checkpoint in checkpoints]
        # `max` of a list with NaN depends on its order.
        best = max(filter(np.isfinite, values), default=None)
        first = None if best is None else values.index(best)
        return [place == first for place in range(len(values))]


def _move(source: epath.Path, target: epath.Path) -> None:
    """Renames a folder; where the name is taken, to the next free one, TARGET_2 and so on."""
    free, number = target, 1
    while free.exists():
        number += 1
        free = target.parent / f"{target.name}_{number}"
    source.rename(free)


def write_params(
    workdir: epath.PathLike, params: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Makes a workdir for other runs to start from: one checkpoint, of step 0, of parameters only.

    Args:
      workdir: new.
      params: nested dict of arrays.
      config: JSON of the run that could have made them.

    Raises:
      ValueError: for a folder that no checkpoint can be written to.
      SaveError: when it could not be written, or does not read back.
    """
    refuse_pattern(workdir, "workdir")
    none = np.zeros((), np.int32)
    state = TrainState(
        step=none, params=params, opt_state={}, ema=None, sums={}, skipped=none, skipped_in_row=none
    )
    run_id = keep_identity(workdir).id
    checkpoints = Checkpoints(workdir, keep=1, best=None, run_id=run_id)
    try:
        checkpoints.save(state, step=0, config=config, metrics=None)
        checkpoints.wait()
    finally:
        checkpoints.close()


def _trainer(state: TrainState) -> dict[str, Any]:
    return {name: value for name, value in vars(state).items() if name not in ("params", "ema")}


def _remove_unfinished(folder: epath.Path) -> None:
    """Deletes the remains of a killed save, which would block the next save of its step."""
    if not folder.exists():
        return
    finished = {str(step) for step in finished_steps(folder)}
    for path in folder.iterdir():
        temporary = ".orbax-checkpoint-tmp" in path.name
        if temporary or (re.fullmatch(r"\d+", path.name) and path.name not in finished):
            logging.warning("removing the unfinished checkpoint %s", path)
            _remove(path)


def _remove(folder: epath.Path, *, patience: float = 10.0) -> None:
    """Deletes a folder into which threads of a failed save may still write for a while."""
    deadline = time.monotonic() + patience
    while folder.exists():
        try:
            folder.rmtree()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
