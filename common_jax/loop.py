"""The one train loop. A phase hands it a loss and says what is trainable."""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from common_jax import hosts, signals
from common_jax import mesh as meshes
from common_jax.checkpoint import Checkpoints, refuse_pattern, take_stock
from common_jax.config import FieldError, Section
from common_jax.metrics import Recorder, read_metrics
from common_jax.optim import OptimConfig
from common_jax.ranges import SEEDS, Name, Positive, Size, one_of
from common_jax.state import TrainState, merge
from common_jax.task import Task, abstract_state, fresh_state, step_program
from common_jax.weights import WarmStart
from common_jax.workdir import (
    LockLost,
    claim,
    hold,
    keep_identity,
    plain,
    read_result,
    require,
    write_json,
)

FAILED_SAVE = ("stop", "go_on")


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """How a run logs, evaluates and saves.

    Attributes:
      log_every: steps a line of metrics.jsonl averages over.
      eval_every: epochs between evaluations; the last step is always evaluated.
      checkpoint_every: epochs between checkpoints; the last step is always saved.
      checkpoint_minutes: time after which a checkpoint is written in between, at the next line of
        the log; None for none.
      on_failed_save: "stop" ends the run when a checkpoint or a line of the log could not be
        written, "go_on" warns and tries again at the next one. The last ones must be written.
      keep: newest checkpoints that stay.
      best: metric whose highest value keeps its checkpoint as well; None for none.
      nan_patience: steps in a row with a non-finite gradient after which the run stops.
      profile: first and last step to trace with jax.profiler into WORKDIR/profile; () for none.
      compilation_cache: folder of compiled programs that later runs take up; None for none.
    """

    log_every: Size = 50
    eval_every: Size = 1
    checkpoint_every: Size = 1
    checkpoint_minutes: Positive | None = 30.0
    on_failed_save: Annotated[str, one_of(*FAILED_SAVE)] = "stop"
    keep: Size = 2
    best: Name | None = "test/accuracy"
    nan_patience: Size = 10
    profile: tuple[Size, ...] = ()
    compilation_cache: Name | None = "~/.cache/modular_jax"

    def __post_init__(self):
        super().__post_init__()
        if self.profile and (len(self.profile) != 2 or self.profile[0] > self.profile[1]):
            raise FieldError(f"profile={self.profile} must be () or (first step, last step)")


def train(
    task: Task,
    run: RunConfig,
    optim: OptimConfig,
    *,
    seed: int,
    workdir: epath.PathLike,
    mesh: Mesh,
    config: Any,
) -> dict[str, Any]:
    """Trains `task` in `workdir`, or resumes there, or does nothing when it is finished.

    Args:
      task: what to train.
      run, optim: how.
      seed: of everything random.
      workdir: gets checkpoints, metrics, TensorBoard events and, at the end, result.json.
      mesh: where.
      config: the frozen dataclass that made the run, or the same as a mapping; kept as JSON in
        every checkpoint. A dataclass knows the fields that earlier versions lacked.

    Returns:
      What result.json holds: phase, steps, skipped steps, metrics of the last evaluation.

    Raises:
      ValueError: as `check`, or when the workdir, its result or all of its checkpoints are another
        run's, or none can be read.
      FloatingPointError: when `run.nan_patience` steps in a row had non-finite gradients.
      OSError: when a checkpoint could not be written, see `RunConfig.on_failed_save`, or another
        process writes in `workdir`.
      signals.Stopped: when the run was asked to stop; it is saved, and resumes when it is started
        again.
    """
    workdir = epath.Path(workdir)
    refuse_pattern(workdir, "workdir")
    with hold(workdir):
        total = optim.total_steps(task.steps_per_epoch)
        result = read_result(workdir, config, phase=task.title, steps=total)
        if result is not None:
            logging.info("%s is finished already: %s", task.title, workdir)
            return result
        with jax.set_mesh(mesh), signals.deferred():
            return _train(task, run, optim, seed, workdir, mesh, config)


def check(
    task: Task, run: RunConfig, optim: OptimConfig, *, seed: int, mesh: Mesh, key: str = "config"
) -> TrainState:
    """Checks all that can be wrong with a run before its data and weights are read.

    Args:
      task, run, optim, seed, mesh: as of `train`; of the task, data and weights may be missing.
      key: of the section that holds `optim`, for messages.

    Returns:
      Shapes and shardings of the state.

    Raises:
      ValueError: as `check_settings`, and for parameters that do not fit the mesh.
    """
    check_settings(task, run, optim, seed=seed, mesh=mesh, key=key)
    with jax.set_mesh(mesh):
        return abstract_state(task, optim, mesh)


def check_settings(
    task: Task, run: RunConfig, optim: OptimConfig, *, seed: int, mesh: Mesh, key: str = "config"
) -> None:
    """The part of `check` that traces no network.

    Raises:
      ValueError: for a batch that does not divide, a seed out of range, a warm-up that is not
        shorter than the run, or a metric that is never measured.
    """
    batch = f"{key}.optim.batch / {key}.optim.accumulate"
    meshes.check_batch(mesh, batch, optim.micro_batch)
    if not 0 <= seed < SEEDS:
        raise ValueError(f"config.seed={seed} must be at least 0 and below 2**32")
    optim.check_warmup(task.steps_per_epoch, key=f"{key}.optim")
    measured = list(task.evaluators)
    if run.best is not None and measured and run.best.partition("/")[0] not in measured:
        raise ValueError(
            f"config.run.best={run.best!r} is not measured: metrics of {task.title} begin with "
            f"{' or '.join(f'{name}/' for name in measured)}; None keeps no best checkpoint"
        )


def _train(task, run, optim, seed, workdir, mesh, config) -> dict[str, Any]:
    # What a user can have got wrong fails here, or when weights are taken, before config.json is
    # there: the folder is still free for a corrected start.
    abstract = check(task, run, optim, seed=seed, mesh=mesh)
    total = optim.total_steps(task.steps_per_epoch)
    step = step_program(task, optim, abstract, log_every=run.log_every)
    # Whose the checkpoints are is asked first: where none is this run's, nothing is written.
    stock, config = take_stock(workdir, config=config, total=total), plain(config)
    fresh = not hosts.agree(bool(stock.steps)).any()
    warm = task.warm_start(abstract.params) if fresh and task.warm_start is not None else None
    claim(workdir, config)

    # The state: newest checkpoint, or fresh parameters with what the warm start gives in their
    # place.
    identity = keep_identity(workdir, adopt=stock.id, unmarked=stock.unmarked)
    checkpoints = Checkpoints(
        workdir,
        keep=run.keep,
        best=run.best,
        on_failed=run.on_failed_save,
        run_id=identity.id,
        foreign=stock.foreign,
    )
    if fresh:
        _keep_account(task, workdir, warm)
        taken = {} if warm is None else warm.params
        state = fresh_state(task, optim, abstract, seed=seed, warm=taken)
    else:
        state = checkpoints.restore_latest(abstract)
    start = int(state.step)
    seed = jax.device_put(np.uint32(seed), meshes.replicated(mesh))
    patient = run.on_failed_save == "go_on"
    recorder = Recorder(workdir, step=start, total=total, title=task.title, patient=patient)
    clock, alarm = _Clock(start, optim.batch), _Alarm(run.checkpoint_minutes)
    pending = None

    def flush() -> None:
        """Reads the step dispatched before, waiting for it: its line of the log, if it has one."""
        nonlocal pending
        if pending is None:
            return
        (at, report), pending = pending, None
        skipped_in_row = int(report["skipped_in_row"])
        if _logs(at, run, total):
            require(workdir)
            recorder.write(at, at / task.steps_per_epoch, _averages(jax.device_get(report)))
            if timing := clock.read(at):
                recorder.write_timing(at, **timing)
        if skipped_in_row >= run.nan_patience:
            raise FloatingPointError(
                f"the last {skipped_in_row} steps up to step {at} had a non-finite loss or "
                f"gradient (config.run.nan_patience={run.nan_patience}). The checkpoints in "
                f"{checkpoints.folder} are from before and stay: lower config.optim.lr or set "
                "config.optim.clip, and start in another workdir"
            )

    def evaluate(at: int) -> dict[str, float]:
        flush()
        values = _evaluate(task, state)
        recorder.write(at, at / task.steps_per_epoch, values)
        clock.restart(at)
        return values

    def save(at: int, values: Mapping[str, float] | None) -> None:
        flush()
        _require_all(workdir)
        if hosts.agree(not recorder.complete()).any():
            logging.warning("step %d is not saved, since its log could not be written", at)
            return
        checkpoints.save(state, step=at, config=config, metrics=values)
        clock.restart(at)
        alarm.restart()

    evaluates = lambda at: _due(at, run.eval_every, task.steps_per_epoch, total)  # noqa: E731
    saves = lambda at: _due(at, run.checkpoint_every, task.steps_per_epoch, total)  # noqa: E731
    timed = run.checkpoint_minutes is not None
    evaluation, saved, done = None, start, start
    try:
        recorded = _evaluations(task, workdir)
        if start and evaluates(start) and not hosts.agree(start in recorded).any():
            # The start before was stopped after this step, and before it was evaluated.
            recorded[start] = evaluation = evaluate(start)
        for at, values in recorded.items():
            if saves(at):
                checkpoints.score(at, values)

        # The loop: dispatch a step, then read the metrics of the one before while it runs.
        batches = _ahead(task.batches(start), mesh) if start < total else iter(())
        traced = _traced_steps(run, start, total)
        for done in range(start + 1, total + 1):
            if traced and done == traced[0]:
                jax.profiler.start_trace(str(workdir / "profile"))
            state, metrics = step(state, task.helpers, next(batches), seed)
            recorder.advance(done)
            flush()
            pending = (done, metrics)
            if traced and done == traced[-1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            hosts.check()
            if evaluates(done):
                evaluation = evaluate(done)
            late = timed and _logs(done, run, total) and hosts.agree(alarm.rings()).any()
            if saves(done) or late:
                save(done, evaluation if saves(done) and evaluates(done) else None)
                saved = done
        if evaluation is None:  # killed between the last checkpoint and result.json
            evaluation = _evaluate(task, state)
    except signals.Stopped:
        if done > saved:
            save(done, None)
        checkpoints.close()
        recorder.close()
        logging.warning("%s is asked to stop, and is saved at step %d", task.title, done)
        raise
    except Exception:
        checkpoints.abandon()
        raise
    checkpoints.close()
    recorder.close()
    result = {"phase": task.title, "steps": total, "skipped": int(state.skipped)} | evaluation
    if jax.process_index() == 0:
        write_json(workdir / "result.json", result)
    return result


def _require_all(workdir: epath.Path) -> None:
    """Raises in all processes where the first, which holds the lock for all, has lost it."""
    lost = None
    try:
        require(workdir)
    except OSError as error:
        lost = error
    if hosts.agree(lost is not None).any():
        raise lost or LockLost(f"{workdir} is no longer this run's; process 0 says why")


def _keep_account(task: Task, workdir: epath.Path, warm: WarmStart | None) -> None:
    """Says what the run starts from, and writes it to warm_start.json."""
    if warm is None:
        if jax.process_index() == 0:  # left by a failed start with another config
            (workdir / "warm_start.json").unlink(missing_ok=True)
        return
    counts = {key: len(entries) for key, entries in warm.account.items()}
    counts["taken"] = sum(entry["parameters"] for entry in warm.account["taken"])
    logging.info("%s starts from %s", task.title, counts)
    if jax.process_index() == 0:
        write_json(workdir / "warm_start.json", warm.account)


def _evaluations(task: Task, workdir: epath.Path) -> dict[int, dict[str, float]]:
    """What the log has of evaluations, by step; in processes that do not share a disk with the
    first, nothing."""
    path = workdir / "metrics.jsonl"
    prefixes = tuple(f"{name}/" for name in task.evaluators)
    return {
        line["step"]: line
        for line in (read_metrics(path) if path.exists() else ())
        if any(name.startswith(prefixes) for name in line)
    }


def _evaluate(task: Task, state: TrainState) -> dict[str, float]:
    params = state.params if state.ema is None else merge(state.params, state.ema)
    step = int(state.step)
    return {
        f"{prefix}/{name}": value
        for prefix, evaluate in task.evaluators.items()
        for name, value in evaluate(params, task.helpers, step).items()
    }


def _ahead(
    batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Batches on the mesh, the next one on its way while one is used."""
    following = meshes.to_devices(next(batches), mesh)
    while True:
        batch = following
        following = meshes.to_devices(next(batches), mesh)
        yield batch


def _averages(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A log line: means over the steps summed, and the counts of skipped steps."""
    counts = {name: int(sums[name]) for name in ("skipped", "skipped_in_row")}
    steps = sums["steps"] or np.nan  # a stretch of skipped steps has no mean
    means = {name: sums[name] / steps for name in sums if name not in (*counts, "steps")}
    return {f"train/{name}": value for name, value in (means | counts).items()}


def _logs(step: int, run: RunConfig, total: int) -> bool:
    return step == total or step % run.log_every == 0


def _traced_steps(run: RunConfig, start: int, total: int) -> range:
    """The steps of config.run.profile that this start of the run will do."""
    if not run.profile:
        return range(0)
    first, last = run.profile
    return range(max(first, start + 1), min(last, total) + 1)


def _due(step: int, epochs: int, steps_per_epoch: int, total: int) -> bool:
    return step == total or step % (epochs * steps_per_epoch) == 0


class _Clock:
    """Wall time of training steps, evaluation and saving left out."""

    def __init__(self, step: int, batch: int):
        self._batch = batch
        self._step, self._start = step, None

    def restart(self, step: int) -> None:
        self._step, self._start = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float] | None:
        """Means since the last reading; None for the first stretch, which compiles."""
        now, before, start = time.perf_counter(), self._step, self._start
        self.restart(step)
        if start is None or step == before:
            return None
        seconds = (now - start) / (step - before)
        return {"examples_per_second": self._batch / seconds, "milliseconds": seconds * 1e3}


class _Alarm:
    """Rings when `minutes` are over; None never rings."""

    def __init__(self, minutes: float | None):
        self._minutes = minutes
        self.restart()

    def restart(self) -> None:
        self._start = time.monotonic()

    def rings(self) -> bool:
        return self._minutes is not None and time.monotonic() - self._start > 60 * self._minutes
