"""A run's own checkpoints, written while it trains and read when it resumes."""

import contextlib
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from common_jax import hosts
from common_jax.checkpoint.belonging import FOLDER, finished_steps
from common_jax.checkpoint.clearing import clear_unfinished, move
from common_jax.checkpoint.contents import (
    FAILURES,
    MARK,
    Outline,
    check_written,
    outline,
    read_mark,
)
from common_jax.checkpoint.manager import Best, Manager, These
from common_jax.checkpoint.meeting import LONGEST, Meeting
from common_jax.checkpoint.reading import AVERAGE, absolute, refuse_pattern
from common_jax.mesh import move_to_devices
from common_jax.state import TrainState
from common_jax.workdir import in_bucket, keep_identity, read_identity, remedy

# Bytes. On CPU, steps wait until a state this large is written, so that no second copy is made.
LARGE = 1 << 30
# Bytes of a file of arrays on disk, unless one array is larger. orbax's default, 2 GiB, buffers up
# to that much of a compressed state in memory until a file is full.
FILE = 1 << 27
# The item of an unfinished average; only the run itself reads it, when it resumes.
PARTIAL_AVERAGE = "partial_average"


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are intact."""


class Checkpoints:
    """The checkpoints of one run: saves asynchronously, keeps the newest `keep` and the best one.

    A save counts only after its files have been checked, in orbax's thread. Until then its folder
    has no marker, and no older checkpoint is deleted.

    All processes of a run must call every method at the same point; if one fails, all raise.

    Args:
      workdir: the run's folder; raises as `refuse_pattern`.
      keep: number of newest checkpoints to keep.
      best: name of the metric whose best value also keeps its checkpoint; or None.
      lower: metrics, by the last part of their names, of which the lowest value is the best.
      on_failed: "stop" raises SaveError after a failed save, "go_on" warns.
      run_id: the id in the run's run.json, written to every checkpoint; None outside a run.
      foreign: why checkpoints do not belong to the run, by step; these are moved aside.
      averaged_from: first step whose average is complete; an earlier checkpoint has its average
        under another name, which is used only to resume.
      at_once: bytes of one item, parameters or trainer, that may be compressed and written at a
        time, never less than the largest array; None for no limit. Files that wait to be written
        take almost as much memory as the arrays.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep: int,
        best: str | None,
        lower: Collection[str] = ("loss",),
        on_failed: str = "stop",
        run_id: str | None = None,
        foreign: Mapping[int, str] | None = None,
        averaged_from: int = 0,
        at_once: int | None = None,
    ):
        refuse_pattern(workdir, "workdir")
        self.folder = absolute(workdir) / FOLDER
        self._keep, self._best, self._on_failed, self._run_id = keep, best, on_failed, run_id
        self._averaged_from, self._at_once = averaged_from, at_once
        self._sign = -1 if best is not None and best.rpartition("/")[2] in lower else 1
        self._scores: dict[int, float] = {}  # of evaluated steps, from `best`; higher is better
        self._also: set[int] = set()  # steps to keep besides
        self._reads = False  # whether orbax may still be reading a state's memory
        # Step and expected content of the save in progress, checked in orbax's thread.
        self._step = None
        self._arrays: dict[str, Outline] = {}
        self._texts: dict[str, Any] = {}
        for step, why in (foreign or {}).items():
            logging.warning("moving checkpoint %s aside: %s", self.folder / str(step), why)
        # Before orbax lists the folder: it could take a foreign step for the newest, and delete
        # one of ours.
        self._foreign = frozenset(foreign or ())
        self._meeting = Meeting()
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
        """Starts writing `state`; returns once the arrays are copied, before they are on disk. On
        CPU they are not copied: call `release` before the next step, which waits for large states.

        Args:
          state, step: the state, and its step counter.
          config: the run's config, as JSON.
          metrics: of the state's evaluation; None if it is evaluated later.

        Raises:
          ValueError: if there are metrics, but `best` is not among them.
          SaveError: if this save or the previous one fails and `on_failed` is "stop".
        """
        if metrics and self._best is not None and self._best not in metrics:
            raise ValueError(
                f"config.run.best={self._best!r} is not one of the metrics {sorted(metrics)}; "
                "None keeps no best checkpoint"
            )
        if metrics:
            self.score(step, metrics)  # kept here, since `_attempt` may replace the manager
        arrays = {"params": state.params, "trainer": _trainer(state)}
        if state.ema is not None:
            arrays[self._average_item(step)] = state.ema
        texts = {"config": dict(config)}
        if self._run_id is not None:
            texts[MARK] = {"id": self._run_id, "step": step}
        file_size = self._file_size(arrays)
        items = {
            name: ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=file_size)
            for name, tree in arrays.items()
        }
        items |= {name: ocp.args.JsonSave(value) for name, value in texts.items()}
        # Finish the previous save first: the fields below describe a single save.
        self._attempt(self._finish)
        self._meeting.begin()
        self._step, self._texts = step, texts
        self._arrays = {name: outline(tree) for name, tree in arrays.items()}
        self._attempt(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(**items),
                force=True,  # orbax must not skip it by a rule of its own
            )
        )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._reads = jax.default_backend() == "cpu" and size >= LARGE

    def _file_size(self, arrays: Any) -> int | None:
        """Bytes per file; None for orbax's default."""
        # An array larger than a file is cut into chunks, which made saves up to 1.4 times slower;
        # and orbax has its own file size for buckets.
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        return FILE if largest <= FILE and not in_bucket(self.folder) else None

    def release(self) -> bool:
        """Waits until a large state has been written, and returns whether there was one; raises as
        `save`. Until then a step cannot reuse the state's memory, and would allocate a second
        state."""
        reads, self._reads = self._reads, False
        if reads:
            self._attempt(self._finish)
        return reads

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a checkpoint, which may have been saved without them."""
        if self._best is not None and self._best in metrics:
            self._scores[step] = self._sign * metrics[self._best]

    def keep_also(self, steps: Collection[int]) -> None:
        """Never deletes these checkpoints."""
        self._also |= set(steps)

    def steps(self) -> list[int]:
        """The steps of the run's complete checkpoints, ascending, as process 0 sees them."""
        return hosts.decide(self._seen)

    def restore_latest(self, abstract: TrainState) -> TrainState:
        """Restores the newest state that can be read, with the shardings of `abstract`.

        Warns about a checkpoint that cannot be read, and tries the one before it. Once one has been
        read, the damaged ones are moved aside, to damaged_STEP.

        Raises:
          ValueError: if none can be read.
        """
        # On shared storage, a process may still see a folder that process 0 has already renamed.
        steps, damaged = self._seen(), []
        # The newest that any process sees: on shared storage some may see a new folder late.
        while (step := int(hosts.largest(max(set(steps) - set(damaged), default=-1))[0])) >= 0:
            state, failure = None, None
            try:
                state = self._restore(step, abstract)
            except FAILURES as error:
                failure = error
            if not hosts.any_process(failure is not None):
                # Only now that the run has a state to continue from; without one it must not change
                # the folder. The manager lists the steps when it opens, so open a new one.
                if damaged:
                    self._manager.close()
                    self._put_aside(damaged, "damaged")
                    self._manager = self._open()
                return state
            reason = failure or "another process says why"
            logging.warning("checkpoint %s cannot be read (%s)", self.folder / str(step), reason)
            damaged.append(step)
        raise ValueError(
            f"none of the checkpoints {steps} in {self.folder} can be read; the warnings above say "
            "why. Move the folder away to start from scratch"
        )

    def _seen(self) -> list[int]:
        """The steps of the run's complete checkpoints that this process sees, ascending."""
        return sorted(set(finished_steps(self.folder)) - self._foreign)

    def wait(self) -> None:
        """Waits until all saves are on disk and checked; raises SaveError if the last one fails."""
        self._attempt(self._finish, last=True)

    def close(self) -> None:
        """Waits for all saves and ends orbax's threads; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def abandon(self) -> None:
        """Lets a save in progress reach the disk after the run failed; never raises."""
        # With several processes this could hang: they write together, and others may be gone.
        if jax.process_count() == 1:
            with contextlib.suppress(*FAILURES):
                self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0:
            clear_unfinished(self.folder)
        hosts.barrier("the checkpoint folder is cleaned up")  # the others must not list it before
        policies = [checkpoint_managers.LatestN(self._keep)]
        if self._best is not None:
            policies += [Best(self._metric), These(self._also)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(
                timeout_secs=LONGEST,
                barrier_sync_fn=self._meeting.wait,
                post_finalization_callback=self._look,
            ),
        )
        return Manager(
            self.folder, self._meeting, options=options, handler_registry=self._handlers()
        )

    def _handlers(self) -> ocp.handlers.CheckpointHandlerRegistry:
        """orbax's handlers, with the limit `at_once` for items with arrays."""
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        if self._at_once is not None:
            limit = -(-self._at_once // 10**9)  # whole GB
            for name in ("params", "trainer", AVERAGE, PARTIAL_AVERAGE):
                handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit)
                registry.add(name, ocp.args.PyTreeSave, handler)
                registry.add(name, ocp.args.PyTreeRestore, handler)
        return registry

    def _look(self) -> None:
        """Raises OSError unless a save's files have the expected content.

        orbax calls this in its own thread, in the process that then writes the marker.
        """
        name = str(self._step)
        # Until it has its marker, a step has a temporary name; in buckets, which cannot rename, its
        # final one.
        places = [
            path
            for path in self.folder.iterdir()
            if path.name == name or path.name.startswith(f"{name}.orbax-checkpoint-tmp")
        ]
        if len(places) != 1:
            raise OSError(f"{self.folder} has {[path.name for path in places]} for step {name}")
        check_written(places[0], self._arrays, self._texts)

    def _finish(self) -> None:
        """Waits for the save in progress; raises if it failed or the folder is no longer ours."""
        with self._meeting.patient(self._step):
            self._manager.wait_until_finished()
        if self._step is None or jax.process_index() != 0:
            return
        # Look at the disk again: orbax reports success even if the folder is deleted meanwhile.
        if self._step not in finished_steps(self.folder):
            raise OSError("it is missing")
        identity = read_identity(self.folder.parent) if self._run_id is not None else None
        if self._run_id is not None and (identity is None or identity.id != self._run_id):
            raise OSError(
                f"run.json beside it {'belongs to another run' if identity else 'is gone'}, so the "
                "workdir was deleted or replaced"
            )

    def _attempt(self, action: Callable[[], Any], *, last: bool = False) -> None:
        """Runs an action that may report a failed save, in this process or another."""
        failure = None
        try:
            action()
        except FAILURES as error:
            failure = error
            self._meeting.publish(error)
        # Every process gets here, failed or not, and then all take the same branch.
        if not hosts.any_process(failure is not None):
            return
        reason = self._meeting.reason() or str(failure)
        failed, self._step = self._step, None
        # A manager with an unfinished save fails in all later calls, so replace it.
        with contextlib.suppress(*FAILURES):
            self._manager.close()
        self._manager = self._open()
        steps = finished_steps(self.folder)
        message = (
            f"the checkpoint of step {failed} could not be written to {self.folder} "
            f"({reason}); "
            + (
                f"the newest intact one is that of step {steps[-1]}"
                if steps
                else "there is no earlier one"
            )
        )
        if last or self._on_failed == "stop":
            does = remedy(getattr(failure, "errno", None), reason)
            advice = f"{does}, and start" if does else "Start"
            where = "it resumes from there" if steps else "it starts from scratch"
            raise SaveError(f"{message}. {advice} the same command again: {where}") from failure
        logging.warning("%s; the run continues", message)

    def _restore(self, step: int, abstract: TrainState) -> TrainState:
        trees = {"params": abstract.params, "trainer": _trainer(abstract)}
        if abstract.ema is not None:
            trees[self._average_item(step)] = abstract.ema
        items = {
            name: ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
            )
            for name, tree in trees.items()
        }
        read_mark(self.folder / str(step))  # raises if the mark is damaged
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        average = restored[self._average_item(step)] if abstract.ema is not None else None
        return TrainState(params=restored["params"], ema=average, **restored["trainer"])

    def _average_item(self, step: int) -> str:
        return AVERAGE if step >= self._averaged_from else PARTIAL_AVERAGE

    def _put_aside(self, steps: Collection[int], why: str) -> None:
        """Renames folders to WHY_STEP, so that nothing is lost and the run can save these steps
        again."""
        for step in steps if jax.process_index() == 0 else ():
            move(self.folder / str(step), self.folder / f"{why}_{step}")
        hosts.barrier("checkpoints are renamed")  # the others must not list them before

    def _metric(self, checkpoint: Any) -> float:
        # Not orbax's own metrics, which are lost when a manager is replaced.
        return self._scores.get(checkpoint.step, float("-inf"))


def write_params(
    workdir: epath.PathLike, params: dict[str, Any], config: Mapping[str, Any]
) -> None:
    """Makes a workdir for other runs to start from: a checkpoint at step 0 with only parameters.

    Args:
      workdir: a new folder; raises as `refuse_pattern`.
      params: nested dict of arrays; numpy arrays in it are replaced by arrays on the device, one by
        one, since orbax would copy all of them at once.
      config: config of a run with these parameters, as JSON.

    Raises:
      SaveError: if the checkpoint cannot be written or read back.
    """
    refuse_pattern(workdir, "workdir")
    move_to_devices(params, SingleDeviceSharding(jax.devices()[0]))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    zero = np.zeros((), np.int32)
    state = TrainState(
        step=zero, params=params, opt_state={}, ema=None, sums={}, skipped=zero, skipped_in_row=zero
    )
    run_id = keep_identity(workdir).id
    checkpoints = Checkpoints(workdir, keep=1, best=None, run_id=run_id, at_once=largest)
    try:
        checkpoints.save(state, step=0, config=config, metrics=None)
        checkpoints.wait()
    finally:
        checkpoints.close()


def _trainer(state: TrainState) -> dict[str, Any]:
    return {name: value for name, value in vars(state).items() if name not in ("params", "ema")}
