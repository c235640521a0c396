"""The train loop, shared by every run. A `Task` defines the model, the data and the loss."""

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from common_jax import hosts, signals
from common_jax import mesh as meshes
from common_jax.checkpoint import FOLDER, Checkpoints, refuse_pattern, take_stock
from common_jax.log import (
    Alarm,
    Console,
    Log,
    introduce,
    read_past,
    unscored,
    watch_compilation,
)
from common_jax.metrics import Recorder, check_tracker, open_tracker
from common_jax.optim import OptimConfig
from common_jax.ranges import SEEDS
from common_jax.report import refresh
from common_jax.run_config import Due, RunConfig, compare_data
from common_jax.state import TrainState, merge
from common_jax.step import Programs
from common_jax.task import (
    Task,
    abstract_state,
    average_program,
    create_program,
    step_program,
)
from common_jax.weights import WarmStart
from common_jax.weights.memory import give_back
from common_jax.workdir import (
    claim,
    hold,
    keep_identity,
    plain,
    read_result,
    require_everywhere,
    write_json,
    write_result,
)


def train(
    task: Task,
    run: RunConfig,
    optim: OptimConfig,
    *,
    seed: int,
    workdir: epath.PathLike,
    mesh: Mesh,
    config: Any,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Trains `task` in `workdir`. Resumes an unfinished run; returns at once for a finished one.

    Args:
      task: what to train.
      run, optim: how to run and how to optimise it.
      seed: seeds everything random.
      workdir: folder for checkpoints, metrics, TensorBoard events and, at the end, result.json.
      mesh: the devices to train on.
      config: the run's config, a frozen dataclass or the same as a mapping; saved as JSON in every
        checkpoint. A dataclass also supplies the fields that earlier versions lacked.
      programs: compiled programs to share between tasks that differ only in their data.

    Returns:
      The content of result.json, see `common_jax.workdir.write_result`.

    Raises:
      ValueError: as `check`; or if the workdir, its result or all of its checkpoints belong to
        another run; or if no checkpoint can be read.
      FloatingPointError: after `run.nan_patience` consecutive steps with a non-finite loss or
        gradient.
      OSError: if a checkpoint cannot be written, see `RunConfig.on_failed_save`, or another
        process is writing to `workdir`.
      signals.Stopped: if the run was asked to stop. It has been saved, and the same call resumes
        it.
    """
    workdir = epath.Path(workdir)
    refuse_pattern(workdir, "workdir")
    with hold(workdir):
        total = optim.total_steps(task.steps_per_epoch)
        result = read_result(workdir, config, phase=task.phase, steps=total)
        if result is not None:
            logging.info("%s is already finished: %s", task.title, workdir)
            return result
        with jax.set_mesh(mesh), signals.deferred():
            result = _train(
                task,
                run,
                optim,
                Programs() if programs is None else programs,
                seed=seed,
                workdir=workdir,
                mesh=mesh,
                config=config,
            )
        give_back()  # frees the state's memory for whatever the caller loads next
        return result


def check(
    task: Task, run: RunConfig, optim: OptimConfig, *, seed: int, mesh: Mesh, key: str = "config"
) -> TrainState:
    """Checks a run before its data and weights are read.

    Args:
      task, run, optim, seed, mesh: as for `train`; the task needs neither data nor weights.
      key: config path of the section that holds `optim`, for messages.

    Returns:
      The state's shapes and shardings.

    Raises:
      ValueError: as `check_settings`, and for parameters that do not divide over the mesh.
    """
    check_settings(task, run, optim, seed=seed, mesh=mesh, key=key)
    with jax.set_mesh(mesh):
        return abstract_state(task, optim, mesh, averaged=run.average_last > 1)


def check_settings(
    task: Task, run: RunConfig, optim: OptimConfig, *, seed: int, mesh: Mesh, key: str = "config"
) -> None:
    """The part of `check` that needs no tracing.

    Raises:
      ValueError: for a batch that does not divide over the mesh, a seed out of range, a run that
        is too long, a warm-up that is not shorter than the run, a profile of later steps, an
        average over more checkpoints than there will be, a metric that is never measured, or a
        tracker that is not installed.
    """
    batch = f"{key}.optim.batch / {key}.optim.accumulate"
    meshes.check_batch(mesh, batch, optim.micro_batch)
    if not 0 <= seed < SEEDS:
        raise ValueError(f"config.seed={seed} must be at least 0 and below 2**32")
    optim.check_length(task.steps_per_epoch, key=f"{key}.optim")
    optim.check_warmup(task.steps_per_epoch, key=f"{key}.optim")
    total = optim.total_steps(task.steps_per_epoch)
    if run.profile and run.profile[0] > total:
        raise ValueError(
            f"config.run.profile={run.profile} begins after the last step of {task.title}, {total}"
        )
    Due(run, task.steps_per_epoch, total).check_average(optim, title=task.title, key=key)
    check_tracker(run.wandb)
    measured = list(task.evaluators)
    if run.best is not None and measured and run.best.partition("/")[0] not in measured:
        raise ValueError(
            f"config.run.best={run.best!r} is not measured: metrics of {task.title} begin with "
            f"{' or '.join(f'{name}/' for name in measured)}; None keeps no best checkpoint"
        )


def _train(
    task: Task,
    run: RunConfig,
    optim: OptimConfig,
    programs: Programs,
    *,
    seed: int,
    workdir: epath.Path,
    mesh: Mesh,
    config: Any,
) -> dict[str, Any]:
    # ----------------------------------------------------------------------------------------------
    # Checks. User errors surface here, or while weights are read, and config.json is written only
    # afterwards: a corrected command can still use the same folder.
    # ----------------------------------------------------------------------------------------------
    abstract = check(task, run, optim, seed=seed, mesh=mesh)
    total = optim.total_steps(task.steps_per_epoch)
    due = Due(run, task.steps_per_epoch, total)
    averaged = due.averaged
    update = programs.keep("step", step_program(task, optim, abstract, log_every=run.log_every))
    if averaged:
        include = programs.keep("average", average_program(task, abstract))
    # Look at the checkpoints first: if they belong to another run, nothing may be written.
    stock, config = take_stock(workdir, config=config, total=total), plain(config)
    fresh = not hosts.any_process(bool(stock.steps))
    warm = task.warm_start(abstract.params) if fresh and task.warm_start is not None else None
    claim(workdir, config)
    if jax.process_index() == 0:
        for name, content in task.files.items():
            write_json(workdir / name, content)
    introduce(task, optim, abstract, mesh, workdir, config)
    due.warn_of_unscored()
    optim.warn_of_average(task.steps_per_epoch)

    # ----------------------------------------------------------------------------------------------
    # State, restored from the newest checkpoint or initialised; warm-start parameters replace
    # freshly initialised ones.
    # ----------------------------------------------------------------------------------------------
    identity = keep_identity(workdir, adopt=stock.id, unmarked=stock.unmarked)
    checkpoints = Checkpoints(
        workdir,
        keep=run.keep,
        best=run.best,
        lower=task.lower,
        on_failed=run.on_failed_save,
        run_id=identity.id,
        foreign=stock.foreign,
        averaged_from=averaged[-1] if averaged else 0,
        # On CPU the files being written take host memory away from the state itself.
        at_once=_largest(abstract) if jax.default_backend() == "cpu" else None,
    )
    if fresh:
        _write_account(task, workdir, warm)
        create = programs.keep("create", create_program(task, optim, abstract))
        state = create(np.uint32(seed), {} if warm is None else warm.params)
        del warm  # whatever was not donated would stay in memory for the whole run
    else:
        state = checkpoints.restore_latest(abstract)
    start = int(state.step)
    give_back()
    if not fresh:
        place = workdir / FOLDER / str(start)
        logging.info("%s resumes at step %d from %s", task.title, start, place)

    # ----------------------------------------------------------------------------------------------
    # Log. Opening it drops the lines that a previous start wrote beyond this step.
    # ----------------------------------------------------------------------------------------------
    recorder = Recorder(
        workdir,
        step=start,
        tracker=open_tracker(run.wandb, workdir, run_id=identity.id, config=config),
        patient=run.on_failed_save == "go_on",
    )
    log = Log(
        recorder,
        Console(task.title, step=start, total=total, shown=task.shown),
        workdir,
        step=start,
        batch=optim.batch,
        steps_per_epoch=task.steps_per_epoch,
        patience=run.nan_patience,
    )
    saver = _Saver(checkpoints, log, workdir, config, step=start, minutes=run.checkpoint_minutes)
    done, evaluation = start, None

    try:
        # ------------------------------------------------------------------------------------------
        # Evaluations of previous starts. If the last one stopped between a step and its
        # evaluation, catch up on it now. A checkpoint that was saved before its evaluation has no
        # score, so the scores are read back from the log.
        # ------------------------------------------------------------------------------------------
        record = workdir / "metrics.jsonl"
        past = read_past(record, step=start, evaluators=task.evaluators, best=run.best)
        compare_data(due, optim, workdir, past.last, start=start)
        if past.averaged:
            state = _reset_sums(state)
        evaluations = dict(past.evaluations)
        if start and due.evaluation(start) and start not in evaluations:
            evaluations[start] = evaluation = _evaluate(task, state, log, due)
        for step, values in evaluations.items():
            if due.checkpoint(step):
                checkpoints.score(step, values)
        if task.evaluators and run.best is not None:
            lost = set(checkpoints.steps()) - evaluations.keys()
            checkpoints.keep_also(unscored(record, due, lost))

        # ------------------------------------------------------------------------------------------
        # Steps. Each step is dispatched before the metrics of the previous one are read, while the
        # next batch is already being copied, so the devices never wait for the host.
        # ------------------------------------------------------------------------------------------
        batches = _prefetch(task.batches(start), mesh) if start < total else iter(())
        # Transferred once, not with every step.
        seed_there = jax.device_put(np.uint32(seed), meshes.replicated(mesh))
        traced = _traced_steps(run, start, total)
        for done in range(start + 1, total + 1):
            if checkpoints.release():
                give_back()  # frees the buffers of files that are now on disk
            if traced and done == traced[0]:
                jax.profiler.start_trace(str(workdir / "profile"))
            with watch_compilation(functools.partial(log.add_compilation, done)):
                # `update` donates the state: nothing may use the old one after this call.
                state, report = update(state, task.helpers, next(batches), seed_there)
            if done in averaged:
                # Before the save: a run that resumes from it does not include this step again.
                state = include(state, np.float32(1 / (1 + averaged.index(done))))
            log.add(done, report, line=due.line(done))
            if traced and done == traced[-1]:
                jax.block_until_ready(state)  # steps run asynchronously, and must be in the trace
                jax.profiler.stop_trace()
            # Stop before the evaluation, which may take long; the next start catches up on it.
            hosts.check()
            if due.evaluation(done):
                evaluation = _evaluate(task, state, log, due)
            if due.checkpoint(done):
                saver.save(state, done, evaluation if due.evaluation(done) else None)
            elif due.line(done) and saver.is_late():
                # Saved without a score even right after an evaluation: whether a save is late
                # depends on wall-clock time, and the choice of the best checkpoint must not.
                saver.save(state, done, None)

        # ------------------------------------------------------------------------------------------
        # Result.
        # ------------------------------------------------------------------------------------------
        if evaluation is None:  # killed between the last checkpoint and result.json
            evaluation = _measure(task, state, due)
    except signals.Stopped:
        # Only hosts.check raises this, never between a state's donation and its replacement, so the
        # state is that of step `done`.
        if done > saver.step:
            saver.save(state, done, None)
        checkpoints.close()
        log.close()
        logging.warning("%s was asked to stop; saved at step %d", task.title, done)
        raise
    except Exception:
        checkpoints.abandon()
        raise
    checkpoints.close()
    log.close()
    return write_result(
        workdir, phase=task.phase, steps=total, skipped=int(state.skipped), metrics=evaluation
    )


class _Saver:
    """Saves a run, flushing its log first: a run cannot resume from a checkpoint whose log lines
    are lost.

    Attributes:
      step: the last step saved since this start; initially the step that it started from.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        log: Log,
        workdir: epath.Path,
        config: Mapping[str, Any],
        *,
        step: int,
        minutes: float | None,
    ):
        self._checkpoints, self._log, self._alarm = checkpoints, log, Alarm(minutes)
        self._workdir, self._config, self._timed = workdir, config, minutes is not None
        self.step = step

    def is_late(self) -> bool:
        """Whether config.run.checkpoint_minutes have passed since the last save, on any process.
        All processes must call this together."""
        return self._timed and hosts.any_process(self._alarm.rings())

    def save(self, state: TrainState, step: int, metrics: Mapping[str, float] | None) -> None:
        self._log.flush()
        require_everywhere(self._workdir)
        self.step = step
        if hosts.any_process(not self._log.complete()):
            logging.warning("step %d was not saved, since its log could not be written", step)
            return
        self._checkpoints.save(state, step=step, config=self._config, metrics=metrics)
        self._log.restart_clock(step)
        self._alarm.restart()


def _write_account(task: Task, workdir: epath.Path, warm: WarmStart | None) -> None:
    """Logs what the run starts from, and writes it to warm_start.json."""
    if warm is None:
        if jax.process_index() == 0:  # may be left over from a failed start with another config
            (workdir / "warm_start.json").unlink(missing_ok=True)
        return
    counts = {key: len(entries) for key, entries in warm.account.items()}
    counts["taken"] = sum(entry["arrays"] for entry in warm.account["taken"])
    logging.info(
        "%s warm-starts: %d arrays taken unchanged, %d adapted, %d left out, %d from scratch",
        task.title,
        *(counts.get(key, 0) for key in ("taken", "adapted", "left", "fresh")),
    )
    if jax.process_index() == 0:
        write_json(workdir / "warm_start.json", warm.account)


def _reset_sums(state: TrainState) -> TrainState:
    """The state after a line of the log. The step itself resets the sums at multiples of
    config.run.log_every, but the line may be one of an earlier start with another log_every."""
    zeros = {
        name: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
        for name, x in state.sums.items()
    }
    return state.replace(sums=zeros)


def _evaluate(task: Task, state: TrainState, log: Log, due: Due) -> dict[str, float]:
    """Evaluates `state`, writes the metrics after the log line of its step, and refreshes the
    report."""
    log.flush()
    values, step = _measure(task, state, due), int(state.step)
    log.write_evaluation(step, values)
    refresh()
    log.restart_clock(step)
    return values


def _measure(task: Task, state: TrainState, due: Due) -> dict[str, float]:
    """Runs all evaluators, on the averaged parameters if there are any."""
    step = int(state.step)
    averaged = state.ema is not None and due.whole_average(step)
    params = merge(state.params, state.ema) if averaged else state.params
    return {
        f"{prefix}/{name}": value
        for prefix, evaluate in task.evaluators.items()
        for name, value in evaluate(params, task.helpers, step).items()
    }


def _largest(abstract: TrainState) -> int:
    """Bytes of the largest array."""
    return max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def _prefetch(
    batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Batches on the mesh. Each batch's copy to the devices starts one step before its use."""
    following = meshes.to_devices(next(batches), mesh)
    while True:
        batch = following
        following = meshes.to_devices(next(batches), mesh)
        yield batch


def _traced_steps(run: RunConfig, start: int, total: int) -> range:
    """The steps of config.run.profile that are still to come in this start of the run."""
    if not run.profile:
        return range(0)
    first, last = run.profile
    return range(max(first, start + 1), min(last, total) + 1)
