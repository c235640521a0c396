"""From a phase's network and objective to a finished run."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from common_jax import loop
from common_jax.config import unfreeze
from common_jax.mesh import Rules
from common_jax.step import make_evaluator
from common_jax.task import Task
from common_jax.weights import WarmStart
from m2mkd_jax.config import Config, DistillConfig
from m2mkd_jax.data.feed import Feed, make_feed
from m2mkd_jax.phases.objective import Forward, Regularizer, make_loss, make_sums


def train_phase(
    config: Config,
    workdir: epath.Path,
    mesh: Mesh,
    *,
    title: str,
    init: Callable[[jax.Array], Mapping[str, Any]],
    rules: Rules,
    forward: Forward,
    trainable: str = ".*",
    helpers: Mapping[str, Any] | None = None,
    warm_start: Callable[[Any], WarmStart] | None = None,
    distill: DistillConfig | None = None,
    regularizer: Regularizer | None = None,
    feed: Feed | None = None,
    programs: dict[str, Callable] | None = None,
) -> dict[str, Any]:
    """Trains, or goes on; see `common_jax.task.Task` for the arguments.

    Args:
      config: with the phase's recipe in `optim`, `augment` and `drop_path`.
      workdir: of this run alone.
      mesh: devices.
      forward: how logits come about.
      distill: the distillation to blend in; None for none.
      regularizer: what is added to the loss, from parameters and step alone; None for nothing.
      feed: data in place of the config's.
      programs: see `common_jax.task.Task`.

    Returns:
      The run's result, see `common_jax.loop.train`.
    """
    feed = config_feed(config, workdir) if feed is None else feed
    evaluate = functools.partial(
        make_evaluator,
        mesh=mesh,
        seed=config.seed,
        fold_step=config.evaluation.noise == "sampled",
    )
    programs = {} if programs is None else programs
    sums = make_sums(forward, config)
    evaluators = {"test": evaluate(sums, feed.evaluation, programs=programs)}
    if feed.ood is not None:
        sums = make_sums(forward, config, classes=feed.ood_classes)
        evaluators["ood"] = evaluate(sums, feed.ood)
    task = Task(
        title=title,
        init=init,
        rules=rules,
        trainable=trainable,
        loss=make_loss(
            forward, config, distill or DistillConfig(kind="none"), regularizer=regularizer
        ),
        helpers=helpers or {},
        warm_start=warm_start,
        batch=feed.batch,
        batches=feed.batches,
        steps_per_epoch=feed.steps_per_epoch,
        evaluators=evaluators,
        programs=programs,
    )
    return loop.train(
        task,
        config.run,
        config.optim,
        seed=config.seed,
        workdir=workdir,
        mesh=mesh,
        config=unfreeze(config).to_dict(),
    )


def config_feed(config: Config, workdir: epath.Path) -> Feed:
    """The feed of the config's data section, and of its ood section where that names a source and
    a whole network is trained."""
    optim, whole = config.optim, config.phase not in ("train_module", "distill")
    return make_feed(
        config.data,
        config.augment,
        batch=optim.batch,
        micro_batch=optim.micro_batch,
        seed=config.seed,
        workdir=workdir,
        ood=config.ood if config.ood.source and whole else None,
    )
