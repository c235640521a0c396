"""Analyses a run's step from shapes and shardings alone: its arguments, its lowered program, its
operations, and the activations that it keeps."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common_jax import mesh as meshes
from common_jax.commands.plan.flops import Flops, count_flops
from common_jax.optim import OptimConfig
from common_jax.state import TrainState, merge, partition, step_rngs
from common_jax.task import Task, abstract_state, step_program


def step_arguments(
    task: Task, optim: OptimConfig, abstract: TrainState, mesh: Mesh
) -> tuple[TrainState, Any, dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """The arguments of `step_program`, as ShapeDtypeStructs with shardings."""
    batch = {
        name: jax.ShapeDtypeStruct(
            (optim.accumulate * part.shape[0], *part.shape[1:]),
            part.dtype,
            sharding=meshes.batched(mesh),
        )
        for name, part in task.batch.items()
    }
    seed = jax.ShapeDtypeStruct((), np.uint32, sharding=meshes.replicated(mesh))
    return abstract, task.helpers, batch, seed


def lower_step(
    task: Task, optim: OptimConfig, mesh: Mesh, *, log_every: int, averaged: bool = False
) -> tuple[jax.stages.Lowered, TrainState]:
    """The lowered train step and its abstract state; the mesh may consist of described devices.

    Raises:
      ValueError: as `abstract_state`.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        abstract = abstract_state(task, optim, mesh, averaged=averaged)
        step = step_program(task, optim, abstract, log_every=log_every)
        return step.lower(*step_arguments(task, optim, abstract, mesh)), abstract


def step_flops(task: Task, optim: OptimConfig) -> Flops:
    """Operations of one update over all devices, without the optimizer: every micro-batch's loss
    and its gradients with respect to the trained parameters."""
    gradient = lambda trained, loss: jax.value_and_grad(loss, has_aux=True)(trained)  # noqa: E731
    return count_flops(*_with_loss(task, gradient)) * optim.accumulate


def kept_shapes(task: Task) -> Any:
    """Shapes of the arrays, parameters included, that the forward pass of a micro-batch keeps for
    the backward pass."""
    residuals = lambda trained, loss: jax.vjp(loss, trained, has_aux=True)[1]  # noqa: E731
    return jax.eval_shape(*_with_loss(task, residuals))


def _with_loss(task: Task, function: Callable[..., Any]) -> tuple[Any, ...]:
    """Returns a function of (params, helpers, batch) that computes function(trained, loss), with
    `loss` a function of the trained parameters; and the shapes of its arguments."""

    def call(params, helpers, batch):
        trained, fixed = partition(params, task.trainable)

        def loss(trained):
            rngs = step_rngs(0, 0, task.streams)
            return task.loss(merge(fixed, trained), helpers, batch, rngs, np.int32(0))

        return function(trained, loss)

    params = jax.eval_shape(task.init, jax.random.key(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), task.helpers)
    return call, params, shapes, dict(task.batch)
