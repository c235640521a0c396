"""A run that takes milliseconds: noisy gradient descent for three epochs of four steps."""

import functools
import itertools
import pathlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from meshes import one_device

from common_jax import loop
from common_jax.optim import OptimConfig
from common_jax.state import fold_name
from common_jax.step import Programs
from common_jax.task import Task

EPOCH, STEPS = 4, 12
OPTIM = OptimConfig(
    steps=STEPS, batch=8, lr=1e-2, lr_per=None, schedule="constant", warmup_epochs=0
)


def run_config(**changes: Any) -> loop.RunConfig:
    """A config that saves every epoch and keeps two checkpoints."""
    return loop.RunConfig(
        **{"log_every": 1, "best": None, "keep": 2, "compilation_cache": None} | changes
    )


@functools.cache
def shared_programs(optim: OptimConfig, log_every: int) -> Programs:
    """Programs shared by all runs with these settings, so that each is compiled once."""
    return Programs()


def descend(
    workdir: pathlib.Path,
    *,
    seed: int = 0,
    task: Task | None = None,
    optim: OptimConfig = OPTIM,
    programs: Programs | None = None,
    **changes: Any,
) -> dict:
    """Trains or resumes a run; returns the result."""
    run = run_config(**changes)
    if task is None and programs is None:
        programs = shared_programs(optim, run.log_every)
    return loop.train(
        make_task(lambda params, helpers, step: {"w": float(params["w"])})
        if task is None
        else task,
        run,
        optim,
        seed=seed,
        workdir=workdir,
        mesh=one_device(),
        config={"seed": seed, "optim": {"steps": STEPS}, "run": {"log_every": run.log_every}},
        programs=programs,
    )


def numbers(step: int) -> np.ndarray:
    """The batch of a step; steps count from 0."""
    return np.random.default_rng(step).normal(size=8).astype(np.float32)


def make_task(
    evaluate: Callable[[Any, Any, int], dict[str, float]], *, broken: Collection[int] = ()
) -> Task:
    """The descent, with what evaluates it, and the steps whose batch is not a number."""

    def batches(first: int):
        for step in itertools.count(first):
            yield {"x": numbers(step) * np.float32(np.nan if step in broken else 1)}

    def loss(params, helpers, batch, rngs, step):
        noise = jax.random.normal(fold_name(rngs["dropout"], "noise"))
        return jnp.mean((params["w"] - batch["x"] - 0.1 * noise) ** 2), {}

    return Task(
        phase="descent",
        init=lambda key: {"w": jax.random.normal(key)},
        rules=(("w", PartitionSpec()),),
        trainable=".*",
        streams=("dropout",),
        loss=loss,
        helpers={},
        warm_start=None,
        batch={"x": jax.ShapeDtypeStruct((8,), np.float32)},
        batches=batches,
        steps_per_epoch=EPOCH,
        evaluators={"test": evaluate},
    )
