"""The train step and the evaluation, as pure functions."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from common_jax import hosts
from common_jax.mesh import AXES, to_devices
from common_jax.optim import OptimConfig, Schedule, keep, make_optimizer
from common_jax.state import TrainState, evaluation_key, merge, partition, step_rngs, subtrees

T = TypeVar("T")
Batch = dict[str, jax.Array]
Rngs = dict[str, jax.Array]
# loss(params, helpers, batch, rngs, step) -> (scalar, metrics). A metric is a mean over the
# examples; rngs has a key for each of the task's streams; step, int32, is the number of updates
# so far.
Loss = Callable[[Any, Any, Batch, Rngs, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
Step = Callable[[TrainState, Any, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
# sums(params, helpers, batch, key) -> totals over the batch's real examples, among them "count".
Sums = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array], dict[str, jax.Array]]
# evaluate(params, helpers, step) -> means over all examples; `step` is the number of updates so
# far.
Evaluate = Callable[[Any, Any, int], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Programs:
    """Jitted functions shared by tasks that differ only in their data. The first task compiles
    them; the others reuse them.

    Attributes:
      kept: the functions by name.
    """

    kept: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    def keep(self, name: str, program: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the program already kept under `name`; if there is none, keeps and returns
        `program`."""
        return self.kept.setdefault(name, program)


def make_step(
    loss: Loss,
    config: OptimConfig,
    schedule: Schedule,
    *,
    trainable: str,
    log_every: int,
    streams: Sequence[str] = (),
    clip_depth: int = 0,
) -> Step:
    """step(state, helpers, batch, seed) -> (state, metrics), to be jitted with `state` donated.

    The batch is split into `config.accumulate` micro-batches whose gradients are averaged. A step
    with a non-finite loss or gradient leaves parameters, optimizer state and average unchanged,
    and is counted as skipped.

    Args:
      loss: what is minimised; `helpers` are parameters that it needs and that are never updated.
      config: optimizer settings.
      schedule: learning rate as a function of the step.
      trainable: regex of the paths of the parameters that are updated.
      log_every: number of steps over which `state.sums` accumulates the metrics.
      streams: names of the random streams that the loss draws from.
      clip_depth: depth of the subtrees that are clipped separately, see
        `common_jax.optim.clip_by_norm`; their norms are added to the metrics.

    Returns:
      The step. Its second result is `state.sums` and the counts of skipped steps, in separate
      buffers, so that they can be read while the next step runs.
    """
    optimizer = make_optimizer(config, clip_depth=clip_depth)

    def step(state: TrainState, helpers: Any, batch: Batch, seed: jax.Array):
        # Only the trained part has gradients, moments and an average.
        trained, fixed = partition(state.params, trainable)

        def objective(trained, micro_batch, rngs):
            return loss(merge(fixed, trained), helpers, micro_batch, rngs, state.step)

        rngs = step_rngs(seed, state.step, streams)
        value, metrics, gradient = _accumulate(objective, trained, batch, rngs, config.accumulate)
        rate, norm = schedule(state.step), optax.tree.norm(gradient)
        metrics |= {"loss": value, "learning_rate": rate, "gradient_norm": norm}
        metrics |= part_norms(gradient, clip_depth)
        # Check both: a loss may be infinite while its gradient is finite, and vice versa.
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        direction, opt_state = optimizer.update(gradient, state.opt_state, trained, finite=finite)
        updated = jax.tree.map(lambda p, u: p - rate * u, trained, direction)
        updated, ema = keep(finite, updated, trained), state.ema
        if config.ema:
            ema = keep(finite, optax.incremental_update(updated, ema, 1 - config.ema), ema)
        sums = _add_metrics(state, metrics, finite, log_every)
        skipped = 1 - finite.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=merge(fixed, updated),
            opt_state=opt_state,
            ema=ema,
            sums=sums,
            skipped=state.skipped + skipped,
            skipped_in_row=(state.skipped_in_row + 1) * skipped,
        )
        report = sums | {"skipped": state.skipped, "skipped_in_row": state.skipped_in_row}
        # Copied, since the state's own buffers will be donated to the next step.
        return state, jax.tree.map(jnp.copy, report)

    return step


def part_norms(gradient: Any, depth: int) -> dict[str, jax.Array]:
    """`PATH/gradient_norm` of every subtree `depth` keys deep. Empty if there is only one, whose
    norm is that of the whole gradient."""
    parts = subtrees(gradient, depth)
    if len(parts) == 1:
        return {}
    return {f"{'/'.join(path)}/gradient_norm": optax.tree.norm(parts[path]) for path in parts}


def init_state(
    params: Any,
    config: OptimConfig,
    *,
    trainable: str,
    metrics: dict[str, Any],
    averaged: bool = False,
) -> TrainState:
    """The state before the first step.

    Args:
      params: all parameters that the run saves.
      config: optimizer settings.
      trainable: regex of the paths of the parameters that are updated.
      metrics: shapes of the metrics that the loss returns.
      averaged: whether to keep an average of the trained parameters even without `config.ema`.
    """
    trained, _ = partition(params, trainable)
    shapes = metrics | {
        name: jax.ShapeDtypeStruct((), jnp.float32)
        for name in ("loss", "learning_rate", "gradient_norm", "steps")
    }
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=make_optimizer(config).init(trained),
        ema=jax.tree.map(jnp.copy, trained) if config.ema or averaged else None,
        sums={name: jnp.zeros(shape.shape, jnp.float32) for name, shape in shapes.items()},
        skipped=jnp.copy(zero),
        skipped_in_row=jnp.copy(zero),
    )


def make_evaluator(
    sums: Sums,
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    *,
    mesh: Mesh,
    seed: int,
    fold_step: bool = False,
    programs: Programs | None = None,
    name: str = "evaluate",
) -> Evaluate:
    """evaluate(params, helpers, step) -> means over all examples, each counted once.

    The returned function raises `common_jax.signals.Stopped` if the processes are asked to stop.

    Args:
      sums: totals over one batch, with padding masked out by `_mask`; jitted here. Its key is
        `evaluation_key` of the seed, the batch's number in the pass and, with `fold_step`, the
        step.
      batches: starts a pass over the set; the last batch is padded.
      mesh: the mesh that batches are put on.
      seed: seeds everything random.
      fold_step: whether each evaluation draws new random numbers instead of the same ones.
      programs: compiled programs to share between tasks or sets that differ only in their data.
      name: key of the program in `programs`; evaluations with different `sums` need different
        names.
    """

    @jax.jit
    def add_up(params: Any, helpers: Any, batch: Batch, seed: Any, index: Any, step: Any):
        key = evaluation_key(seed, index, step=step if fold_step else None)
        return sums(params, helpers, batch, key)

    if programs is not None:
        add_up = programs.keep(name, add_up)

    def evaluate(params: Any, helpers: Any, step: int) -> dict[str, float]:
        total = None
        for index, batch in enumerate(batches()):
            hosts.check()
            place = np.uint32(seed), np.int32(index), np.int32(step)
            part = add_up(params, helpers, to_devices(batch, mesh), *place)
            # Summed on the devices: reading a number here would block on every batch.
            total = part if total is None else jax.tree.map(jax.numpy.add, total, part)
        if total is None:
            raise ValueError("there is nothing to evaluate on: the set is empty")
        values = {name: float(value) for name, value in total.items()}
        count = values.pop("count")
        return {name: value / count for name, value in values.items()}

    return evaluate


def one_behind(results: Iterable[T]) -> Iterator[T]:
    """Yields each result once the next has been dispatched, so that reading it on the host overlaps
    with the devices' work."""
    waiting: list[T] = []
    for result in results:
        yield from waiting
        waiting = [result]
    yield from waiting


def _accumulate(objective, trained, batch: Batch, rngs: Rngs, count: int):
    """Mean loss, metrics and gradient over `count` micro-batches, each with its own keys."""
    differentiate = jax.value_and_grad(objective, has_aux=True)
    if count == 1:  # avoids the accumulators, which are as large as the gradient
        (value, metrics), gradient = differentiate(trained, batch, rngs)
        return value, metrics, gradient

    def micro_step(total, inputs):
        index, micro_batch = inputs
        keys = {name: jax.random.fold_in(key, index) for name, key in rngs.items()}
        return jax.tree.map(jnp.add, total, differentiate(trained, micro_batch, keys)), None

    micro_batches = jax.tree.map(lambda x: _split(x, count), batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(differentiate, trained, first, rngs)
    # From zeros: starting from the first micro-batch's result would compile the loss twice.
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = jax.lax.scan(micro_step, zeros, (jnp.arange(count), micro_batches))
    (value, metrics), gradient = jax.tree.map(lambda x: x / count, total)
    return value, metrics, gradient


def _split(x: jax.Array, count: int) -> jax.Array:
    """(B, ...) to (count, B / count, ...), with every `count`-th example in one micro-batch."""
    # A device holds consecutive examples. Striding gives each micro-batch an equal share of every
    # device's examples, so no example moves between devices.
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, AXES))


def _add_metrics(state: TrainState, metrics, finite: jax.Array, log_every: int):
    """The sums since the last log line, without skipped steps."""
    metrics = metrics | {"steps": jnp.ones(())}
    # Reset here, not in the loop, which would need a separate program for it.
    fresh = state.step % log_every == 0
    return {
        name: jnp.where(fresh, 0, state.sums[name]) + jnp.where(finite, value, 0)
        for name, value in metrics.items()
    }
