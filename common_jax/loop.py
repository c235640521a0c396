"""The one train loop. A phase hands it a loss and says what is trainable."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from common_jax import config as configs
from common_jax import mesh as meshes
from common_jax.checkpoint import FOLDER, Checkpoints, finished_steps
from common_jax.metrics import Recorder
from common_jax.optim import OptimConfig, make_optimizer, make_schedule
from common_jax.state import TrainState, fold_name, merge, partition, step_rngs
from common_jax.step import Evaluate, Loss, init_state, make_step
from common_jax.weights import WarmStart


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a run logs, evaluates and saves.

    Attributes:
      log_every: steps a line of metrics.jsonl averages over.
      eval_every: epochs between evaluations; the last step is always evaluated.
      checkpoint_every: epochs between checkpoints; the last step is always saved.
      keep: newest checkpoints that stay.
      best: metric whose highest value keeps its checkpoint as well; None for none.
      nan_patience: steps in a row with a non-finite gradient after which the run stops.
      profile: first and last step to trace with jax.profiler into WORKDIR/profile; () for none.
      compilation_cache: folder of compiled programs that later runs take up; None for none.
    """

    log_every: int = 50
    eval_every: int = 1
    checkpoint_every: int = 1
    keep: int = 2
    best: str | None = "test/accuracy"
    nan_patience: int = 10
    profile: tuple[int, ...] = ()
    compilation_cache: str | None = "~/.cache/modular_jax"

    def __post_init__(self):
        for name in ("log_every", "eval_every", "checkpoint_every", "keep", "nan_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.run.{name}={getattr(self, name)} must be at least 1")
        if self.profile and (len(self.profile) != 2 or self.profile[0] > self.profile[1]):
            raise ValueError(
                f"config.run.profile={self.profile} must be () or (first step, last step)"
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """What a phase hands to the loop.

    Attributes:
      title: for the progress bar and the report.
      init: key -> nested dict of all parameters; traced, so nothing exists before it is sharded.
      rules: partition rules of the parameters.
      trainable: regex of the paths that are updated.
      loss: see `common_jax.step.Loss`.
      helpers: parameters that the loss needs and that this run neither changes nor saves.
      warm_start: called once at the start of a fresh run with shapes and shardings of all
        parameters; what it gives replaces fresh parameters. None starts from fresh ones alone.
      batch: shapes and dtypes of a micro-batch over all hosts.
      batches: first step -> batches of numpy arrays from there on.
      steps_per_epoch: updates in a pass over the training set.
      evaluators: what to evaluate, each under the prefix of its metrics.
      programs: compiled functions. Runs that differ in data alone are given the same dict: the
        first fills it, and later ones compile nothing.
    """

    title: str
    init: Callable[[jax.Array], Mapping[str, Any]]
    rules: meshes.Rules
    trainable: str
    loss: Loss
    helpers: Mapping[str, Any]
    warm_start: Callable[[Any], WarmStart] | None
    batch: Mapping[str, jax.ShapeDtypeStruct]
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]]
    steps_per_epoch: int
    evaluators: Mapping[str, Evaluate]
    programs: dict[str, Callable] = dataclasses.field(default_factory=dict)


def train(
    task: Task,
    run: RunConfig,
    optim: OptimConfig,
    *,
    seed: int,
    workdir: epath.PathLike,
    mesh: Mesh,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Trains `task` in `workdir`, or goes on there, or does nothing when it is finished.

    Args:
      task: what to train.
      run, optim: how.
      seed: of everything random.
      workdir: gets checkpoints, metrics, TensorBoard events and, at the end, result.json.
      mesh: where.
      config: the JSON that made the run, kept beside every checkpoint.

    Returns:
      What result.json holds: phase, steps, skipped steps, metrics of the last evaluation.

    Raises:
      ValueError: when the batch does not divide, or no checkpoint can be read.
      FloatingPointError: when `run.nan_patience` steps in a row had non-finite gradients.
    """
    workdir = epath.Path(workdir)
    refuse_other_config(workdir, config)
    if (workdir / "result.json").exists():
        logging.info("%s is finished already: %s", task.title, workdir)
        return json.loads((workdir / "result.json").read_text())
    with jax.set_mesh(mesh):
        return _train(task, run, optim, seed, workdir, mesh, config)


def _train(task, run, optim, seed, workdir, mesh, config) -> dict[str, Any]:
    # What a user can have got wrong fails here, or when weights are taken, before config.json is
    # there: the folder is still free for a corrected start.
    meshes.check_batch(mesh, "config.optim.batch / config.optim.accumulate", optim.micro_batch)
    total = optim.total_steps(task.steps_per_epoch)
    schedule = make_schedule(optim, task.steps_per_epoch)
    abstract = _abstract_state(task, optim, mesh)
    fresh = not finished_steps(workdir / FOLDER)
    warm = task.warm_start(abstract.params) if fresh and task.warm_start is not None else None
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", config)

    # The state: newest checkpoint, or fresh parameters with what the warm start gives in their
    # place.
    checkpoints = Checkpoints(workdir, keep=run.keep, best=run.best)
    if fresh:
        state = _fresh_state(task, optim, seed, workdir, abstract, warm)
    else:
        state = checkpoints.restore_latest(abstract)
    start = int(state.step)
    seed = jax.device_put(np.uint32(seed), meshes.replicated(mesh))

    step = jax.jit(
        make_step(task.loss, optim, schedule, trainable=task.trainable, log_every=run.log_every),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, abstract), None),
    )
    step = task.programs.setdefault("step", step)
    recorder = Recorder(workdir, step=start, total=total, title=task.title)
    clock = _Clock(start, optim.batch)
    evaluation, pending = None, None

    def flush() -> None:
        """Reads the step dispatched before, waiting for it: its line of the log, if it has one."""
        nonlocal pending
        if pending is None:
            return
        (at, report), pending = pending, None
        skipped_in_row = int(report["skipped_in_row"])
        if _logs(at, run, total):
            recorder.write(at, at / task.steps_per_epoch, _averages(jax.device_get(report)))
            if timing := clock.read(at):
                recorder.write_timing(at, **timing)
        if skipped_in_row >= run.nan_patience:
            checkpoints.close()
            raise FloatingPointError(
                f"the last {skipped_in_row} steps up to step {at} had a non-finite loss or "
                f"gradient (config.run.nan_patience={run.nan_patience}). The checkpoints in "
                f"{checkpoints.folder} are from before and stay: lower config.optim.lr or set "
                "config.optim.clip, and start in another workdir"
            )

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
        if _due(done, run.eval_every, task.steps_per_epoch, total):
            flush()
            evaluation = _evaluate(task, state)
            recorder.write(done, done / task.steps_per_epoch, evaluation)
            clock.restart(done)
        if _due(done, run.checkpoint_every, task.steps_per_epoch, total):
            flush()
            at_step = _due(done, run.eval_every, task.steps_per_epoch, total)
            checkpoints.save(
                state, step=done, config=config, metrics=evaluation if at_step else None
            )
            clock.restart(done)

    if evaluation is None:  # killed between the last checkpoint and result.json
        evaluation = _evaluate(task, state)
    checkpoints.close()
    recorder.close()
    result = {"phase": task.title, "steps": total, "skipped": int(state.skipped)} | evaluation
    if jax.process_index() == 0:
        write_json(workdir / "result.json", result)
    return result


def claim(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Keeps `config` in a workdir of several runs; raises as `refuse_other_config`."""
    refuse_other_config(workdir, config)
    if jax.process_index() == 0:
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", config)


def refuse_other_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Raises ValueError when `workdir` holds a run of another config, with the fields that
    differ."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    lines = configs.difference(_lasting(json.loads(path.read_text())), _lasting(config))
    if lines:
        raise ValueError(
            f"{workdir} holds a run of another config:\n  "
            + "\n  ".join(lines)
            + "\ngive another --workdir, or the flags that make these fields equal"
        )


# Fields that change no more of what is computed than its rounding: a run may go on with others.
PASSING = ("run.profile", "run.compilation_cache", "mesh.data", "mesh.fsdp", "mesh.expert")


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in configs.flatten(config) if key not in PASSING}


def _abstract_state(task: Task, optim: OptimConfig, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the whole state; no array exists yet."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    shardings = meshes.match_rules(task.rules, params, mesh)
    rngs = jax.eval_shape(lambda: step_rngs(0, 0))
    step = jax.ShapeDtypeStruct((), np.int32)
    _, metrics = jax.eval_shape(task.loss, params, task.helpers, task.batch, rngs, step)
    state = jax.eval_shape(
        lambda params: init_state(params, optim, trainable=task.trainable, metrics=metrics), params
    )
    trained, _ = partition(shardings, task.trainable)
    whole = meshes.replicated(mesh)
    placed = jax.tree.map(lambda _: whole, state).replace(
        params=shardings,
        opt_state=optax.tree_utils.tree_map_params(
            make_optimizer(optim),
            lambda _, sharding: sharding,
            state.opt_state,
            trained,
            transform_non_params=lambda _: whole,
        ),
        ema=None if state.ema is None else trained,
    )
    return meshes.with_shardings(state, placed)


# Drawing parameters happens once and is three times quicker to compile without optimisation.
RUN_ONCE = {"cpu": {"xla_backend_optimization_level": 0}}


def _fresh_state(
    task, optim, seed: int, workdir: epath.Path, abstract: TrainState, warm: WarmStart | None
) -> TrainState:
    """The state at step 0, born sharded: only what the warm start does not give is drawn."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if warm is not None:
        counts = {key: len(entries) for key, entries in warm.account.items()}
        counts["taken"] = sum(entry["parameters"] for entry in warm.account["taken"])
        logging.info("%s starts from %s", task.title, counts)
        if jax.process_index() == 0:
            write_json(workdir / "warm_start.json", warm.account)

    def create(seed: jax.Array, warm: Mapping[str, Any]) -> TrainState:
        params = merge(task.init(fold_name(jax.random.key(seed), "init")), warm)
        return init_state(params, optim, trainable=task.trainable, metrics=abstract.sums)

    options = RUN_ONCE.get(jax.default_backend())
    compiled = jax.jit(create, out_shardings=shardings, donate_argnums=1, compiler_options=options)
    compiled = task.programs.setdefault("create", compiled)
    return compiled(np.uint32(seed), {} if warm is None else warm.params)


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


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, whenever the process may be killed."""
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


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
