"""From what a phase trains to a finished run."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from common_jax import loop
from common_jax.mesh import Rules
from common_jax.step import Programs, make_evaluator
from common_jax.task import Task
from common_jax.weights import WarmStart
from m2mkd_jax.config import Config, DistillConfig
from m2mkd_jax.data.feed import Feed, batch_shapes, make_feed
from m2mkd_jax.data.sources import Source
from m2mkd_jax.phases.objective import Forward, Regularizer, make_loss, make_sums

# Random numbers of training: transforms of images, pairing of examples, stochastic depth, noise of
# routers; of NACs noise on codes, edges, first states of latents, Gumbel noise of the pooling.
STREAMS = ("augment", "mix", "drop_path", "gate", "code", "kernel", "state", "pooling")
SHOWN = ("train/loss", "train/skipped", "test/loss", "test/accuracy")  # on the terminal


@dataclasses.dataclass(frozen=True)
class Training:
    """What a phase trains, made of config and mesh alone: no data and no weights are read for it,
    and its step can be compiled where the mesh's devices are only described.

    Attributes:
      config: with the phase's recipe in `optim`, `augment` and `drop_path`.
      title, init, rules, trainable, clip_depth: see `common_jax.task.Task`.
      forward: how logits come about.
      helpers: shapes and shardings of the parameters that `forward` needs and that are not trained.
      distill: the distillation to blend in.
      regularizer: updates an epoch -> what is added to the loss, from parameters and step alone;
        None for nothing.
    """

    config: Config
    title: str
    init: Callable[[jax.Array], Mapping[str, Any]]
    rules: Rules
    forward: Forward
    trainable: str = ".*"
    clip_depth: int = 0
    helpers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    distill: DistillConfig = DistillConfig(kind="none")
    regularizer: Callable[[int], Regularizer] | None = None

    def task(self, *, steps_per_epoch: int) -> Task:
        """The task without data and weights, which is enough to compile its step."""
        config, regularizer = self.config, self.regularizer
        return Task(
            title=self.title,
            init=self.init,
            rules=self.rules,
            trainable=self.trainable,
            streams=STREAMS,
            shown=SHOWN,
            clip_depth=self.clip_depth,
            loss=make_loss(
                self.forward,
                config,
                self.distill,
                regularizer=None if regularizer is None else regularizer(steps_per_epoch),
            ),
            batch=batch_shapes(config.data, config.optim.micro_batch),
            steps_per_epoch=steps_per_epoch,
            helpers=self.helpers,
        )


def train_phase(
    training: Training,
    workdir: epath.Path,
    mesh: Mesh,
    *,
    helpers: Mapping[str, Any] | None = None,
    warm_start: Callable[[Any], WarmStart] | None = None,
    feed: Feed | None = None,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Trains, or goes on.

    Args:
      training: what.
      workdir: of this run alone.
      mesh: devices.
      helpers: the parameters that `training.helpers` describes.
      warm_start: see `common_jax.task.Task`.
      programs: see `common_jax.loop.train`.
      feed: data in place of the config's.

    Returns:
      The run's result, see `common_jax.loop.train`.
    """
    config = training.config
    feed = config_feed(config, workdir) if feed is None else feed
    task = dataclasses.replace(
        with_feed(training, feed, mesh, programs=programs),
        helpers=helpers or {},
        warm_start=warm_start,
    )
    return loop.train(
        task,
        config.run,
        config.optim,
        seed=config.seed,
        workdir=workdir,
        mesh=mesh,
        config=config,
        programs=programs,
    )


def with_feed(
    training: Training, feed: Feed, mesh: Mesh, *, programs: Programs | None = None
) -> Task:
    """The task with data, and without weights."""
    config, forward = training.config, training.forward
    evaluate = functools.partial(
        make_evaluator,
        mesh=mesh,
        seed=config.seed,
        fold_step=config.evaluation.noise == "sampled",
    )
    sums = make_sums(forward, config)
    evaluators = {"test": evaluate(sums, feed.evaluation, programs=programs)}
    if feed.ood is not None:
        sums = make_sums(forward, config, classes=feed.ood_classes)
        evaluators["ood"] = evaluate(sums, feed.ood)
    return dataclasses.replace(
        training.task(steps_per_epoch=feed.steps_per_epoch),
        batches=feed.batches,
        evaluators=evaluators,
    )


def check_training(
    training: Training, feed: Feed, mesh: Mesh, *, key: str = "config", trace: bool = True
) -> None:
    """Checks a run before anything is written. Raises as `common_jax.loop.check`.

    Args:
      key: of the section of its recipe, for messages.
      trace: whether to check its networks too, which takes a few seconds.
    """
    config, task = training.config, with_feed(training, feed, mesh)
    check = loop.check if trace else loop.check_settings
    check(task, config.run, config.optim, seed=config.seed, mesh=mesh, key=key)


def config_feed(
    config: Config, workdir: epath.Path, sources: tuple[Source, Source] | None = None
) -> Feed:
    """The feed of the config's data section, and of its ood section where that names a source and
    a whole network is trained. `sources` are training and test split, where they are read
    already."""
    train, test = (None, None) if sources is None else sources
    optim, whole = config.optim, config.phase not in ("train_module", "distill")
    return make_feed(
        config.data,
        config.augment,
        batch=optim.batch,
        micro_batch=optim.micro_batch,
        seed=config.seed,
        workdir=workdir,
        train=train,
        test=test,
        ood=config.ood if config.ood.source and whole else None,
    )
