"""The task that the train loop runs, and the jitted programs built from it.

A program is compiled from shapes and shardings alone, so the same functions serve real runs and
compilation for machines that are not available.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from common_jax import mesh as meshes
from common_jax.optim import OptimConfig, make_optimizer, make_schedule
from common_jax.state import TrainState, fold_name, merge, partition, step_rngs
from common_jax.step import Evaluate, Loss, init_state, make_step, part_norms
from common_jax.weights import WarmStart


@dataclasses.dataclass(frozen=True)
class Task:
    """All that the loop needs to know about what it trains.

    Attributes:
      phase: name of its phase or stage, as in result.json.
      part: which of the phase's runs it is, such as the modules that it trains; "" if there is one.
      init: key -> nested dict of all parameters; traced, so that parameters are created sharded.
      rules: partition rules of the parameters.
      trainable: regex of the paths that are updated.
      clip_depth: depth of the parameter subtrees whose gradients are clipped separately, each by
        its own norm, as if it were trained alone; 0 clips the whole gradient by one norm.
      loss: see `common_jax.step.Loss`.
      streams: names of the random streams that the loss draws from; it gets one key for each.
      batch: global shapes and dtypes of a micro-batch.
      steps_per_epoch: updates in a pass over the training set.
      helpers: parameters that the loss needs and that this run neither updates nor saves; for
        compilation, their shapes and shardings are enough.
      warm_start: called once at the start of a fresh run with the shapes and shardings of all
        parameters; the parameters that it returns replace freshly initialised ones. None
        initialises all of them.
      batches: first step -> batches of numpy arrays from that step on; not needed for compilation.
      evaluators: evaluators by the prefix of their metrics.
      lower: their metrics, by the last part of their names, of which lower is better.
      shown: names of the metrics shown on the terminal; metrics.jsonl has all.
      files: name -> content of further JSON files, written beside config.json, that are needed to
        use the result.
    """

    phase: str
    init: Callable[[jax.Array], Mapping[str, Any]]
    rules: meshes.Rules
    trainable: str
    loss: Loss
    batch: Mapping[str, jax.ShapeDtypeStruct]
    steps_per_epoch: int
    part: str = ""
    streams: tuple[str, ...] = ()
    clip_depth: int = 0
    helpers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warm_start: Callable[[Any], WarmStart] | None = None
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]] | None = None
    evaluators: Mapping[str, Evaluate] = dataclasses.field(default_factory=dict)
    lower: tuple[str, ...] = ("loss",)
    shown: tuple[str, ...] = ("train/loss", "train/skipped")
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name in the progress bar and the log."""
        return f"{self.phase} {self.part}".strip()


def abstract_state(
    task: Task, optim: OptimConfig, mesh: Mesh, *, averaged: bool = False
) -> TrainState:
    """Shapes and shardings of the whole state, as ShapeDtypeStructs; no array exists yet.

    Args:
      task, optim, mesh: the run's.
      averaged: as for `common_jax.step.init_state`.

    Raises:
      ValueError: for parameters that do not divide over the mesh.
    """
    params = jax.eval_shape(task.init, jax.random.key(0))
    shardings = meshes.match_rules(task.rules, params, mesh)
    rngs = jax.eval_shape(lambda: step_rngs(0, 0, task.streams))
    step = jax.ShapeDtypeStruct((), np.int32)
    _, metrics = jax.eval_shape(task.loss, params, task.helpers, task.batch, rngs, step)
    trained, _ = partition(params, task.trainable)
    metrics |= jax.eval_shape(lambda tree: part_norms(tree, task.clip_depth), trained)
    state = jax.eval_shape(
        lambda params: init_state(
            params, optim, trainable=task.trainable, metrics=metrics, averaged=averaged
        ),
        params,
    )
    # Moments and averages are sharded like their parameters; everything else is replicated.
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


def step_program(
    task: Task, optim: OptimConfig, abstract: TrainState, *, log_every: int
) -> Callable[..., Any]:
    """The jitted train step, step(state, helpers, batch, seed) -> (state, metrics), with `state`
    donated and sharded like `abstract`. See `common_jax.step.make_step`."""
    schedule = make_schedule(optim, task.steps_per_epoch)
    step = make_step(
        task.loss,
        optim,
        schedule,
        trainable=task.trainable,
        streams=task.streams,
        clip_depth=task.clip_depth,
        log_every=log_every,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # The metrics are replicated, like the step counter: every process reads them.
    outputs = (shardings, shardings.step)
    # Donated, so that the new state reuses the memory of the old one.
    return jax.jit(step, donate_argnums=0, out_shardings=outputs)


def average_program(
    task: Task, abstract: TrainState
) -> Callable[[TrainState, jax.Array], TrainState]:
    """The jitted include(state, share) -> state, which moves the state's average towards its
    parameters:  a <- (1 - share) a + share p. The state is donated.

    A share of 1 / k at the k-th included step gives the mean over these steps.
    """

    def include(state: TrainState, share: jax.Array) -> TrainState:
        trained, _ = partition(state.params, task.trainable)
        return state.replace(ema=optax.incremental_update(trained, state.ema, share))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(include, donate_argnums=0, out_shardings=shardings)


# Initialisation runs once, and compiles three times faster without optimisation.
RUN_ONCE = {"cpu": {"xla_backend_optimization_level": 0}}


def create_program(
    task: Task, optim: OptimConfig, abstract: TrainState
) -> Callable[[jax.Array, Mapping[str, Any]], TrainState]:
    """The jitted create(seed, warm) -> the state at step 0, sharded like `abstract`. Initialises
    only the parameters that `warm` lacks; `warm` is donated."""

    def create(seed: jax.Array, warm: Mapping[str, Any]) -> TrainState:
        # Under jit, the parameters that `warm` replaces are never computed, and the others are
        # created already sharded.
        params = merge(task.init(fold_name(jax.random.key(seed), "init")), warm)
        return init_state(
            params,
            optim,
            trainable=task.trainable,
            metrics=abstract.sums,
            averaged=abstract.ema is not None,
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    options = RUN_ONCE.get(jax.default_backend())
    return jax.jit(create, out_shardings=shardings, donate_argnums=1, compiler_options=options)
