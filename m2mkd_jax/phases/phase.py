"""`Phase`, the record of a phase, and the `Training` that it describes."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from common_jax.mesh import Rules
from common_jax.report import Table
from common_jax.task import Task
from common_jax.weights import Planned
from m2mkd_jax.config import Config, DistillConfig
from m2mkd_jax.data.feed import Feed, batch_shapes, make_feed
from m2mkd_jax.data.few_shot import Episode
from m2mkd_jax.data.source import Source
from m2mkd_jax.families.family import Regularizer
from m2mkd_jax.phases.networks import network_streams
from m2mkd_jax.phases.objective import Forward, make_loss

Splits = tuple[Source, Source]  # training and test

STREAMS = ("augment", "mix")  # random streams of training besides those of the networks
SHOWN = ("train/loss", "train/skipped", "test/loss", "test/accuracy")  # metrics on the terminal

# Config sections and fields that every phase reads.
ALWAYS = ("phase", "seed", "precision", "matmul_precision", "data", "evaluation", "mesh", "run")
RECIPE = ("optim", "augment", "drop_path")
ALLOWANCES = ("sources.fresh", "sources.leave")


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """A config field that names one or more workdirs to take weights from.

    Attributes:
      field: its name in `section`.
      section: the section of the config.
      used: config -> whether the phase reads it.
      made: whether an earlier phase of a pipeline produces it, as one workdir per stage or one for
        all; otherwise only config.sources can give it, with any number of workdirs.
    """

    field: str
    section: str = "sources"
    used: Callable[[Config], bool] = lambda config: True
    made: bool = True

    @property
    def path(self) -> str:
        """Its path below `config`."""
        return f"{self.section}.{self.field}"

    def value(self, config: Config) -> str | tuple[str, ...]:
        """The workdir or workdirs that `config` names."""
        return operator.attrgetter(self.path)(config)


@dataclasses.dataclass(frozen=True)
class Training:
    """The training of a phase.

    It depends only on config, mesh and, with several teachers, the configs of their runs. It reads
    no data and no weights, so its step can be compiled for devices that are only described.

    Attributes:
      phase: its phase.
      config: the config, with the phase's recipe in `optim`, `augment` and `drop_path`.
      init, rules, trainable: see `common_jax.task.Task`.
      forward: maps parameters and images to logits.
      helpers: shapes and shardings of the frozen parameters that `forward` needs.
      distill: the distillation to blend into the loss.
      regularizer: steps per epoch -> a loss term that depends only on parameters and step.
    """

    phase: "Phase"
    config: Config
    init: Callable[[jax.Array], Mapping[str, Any]]
    rules: Rules
    forward: Forward
    trainable: str = ".*"
    helpers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    distill: DistillConfig = DistillConfig(kind="none")
    regularizer: Callable[[int], Regularizer] | None = None

    @functools.cached_property
    def shapes(self) -> Mapping[str, Any]:
        """The shapes of the parameters that its run saves, a nested dict; traced once."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @property
    def clip_depth(self) -> int:
        """See `common_jax.task.Task`: the gradient of each module, such as "student/stage_1", is
        clipped on its own."""
        return 2 if self.phase.modular else 0

    def task(self, *, steps_per_epoch: int) -> Task:
        """The task without data or weights; this is enough to compile its step."""
        config, regularizer = self.config, self.regularizer
        return Task(
            phase=config.phase,
            part=config.module if self.phase.modular else "",
            init=self.init,
            rules=self.rules,
            trainable=self.trainable,
            streams=(*STREAMS, *network_streams(config, train=True)),
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


@dataclasses.dataclass(frozen=True)
class FileKind:
    """A kind of published weight file that corresponds to a phase.

    Attributes:
      name: name of the kind; {family} stands for the name of the network's family.
      about: description for users; {network} stands for what the network is called.
      single: whether it holds a single stage of the network.
      cut: whether it has the layout of a module that the original cut from a trained teacher.
      shallow: whether each stage of the network has one block.
    """

    name: str
    about: str
    single: bool = False
    cut: bool = False
    shallow: bool = False


def config_feed(training: Training, workdir: epath.Path, splits: Splits | None = None) -> Feed:
    """The feed of config.data, and of config.ood if it names a source and the phase evaluates it;
    give `splits` if they are already loaded."""
    config, (train, test) = training.config, splits or (None, None)
    return make_feed(
        config.data,
        config.augment,
        batch=config.optim.batch,
        micro_batch=config.optim.micro_batch,
        seed=config.seed,
        workdir=workdir,
        train=train,
        test=test,
        ood=config.ood if config.ood.source and training.phase.ood else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A kind of run: everything that the rest of the code needs to know about it.

    Attributes:
      describe: (config, mesh) -> its training.
      run: (config, workdir, mesh, splits) -> its result; trains, or resumes. `splits` are the
        images of config.data if they are already loaded, otherwise None.
      role: key of the parameters that it trains and saves: "meta", "module", "teacher" or
        "student".
      reads: config sections and fields that it reads, besides `ALWAYS`, `RECIPE`, its sources and
        the OOD set.
      differentiates: config sections of the networks that gradients flow through, so that their
        activations must be kept.
      sources: fields that name the workdirs it takes weights from.
      modular: whether it trains the modules that config.module names, `distill.pairs_at_once` per
        program, instead of a whole network.
      ood: whether it evaluates the OOD set.
      evaluators: keys of `m2mkd_jax.evaluators.EVALUATORS`.
      feed: (training, workdir, splits) -> its data.
      fit: checks, without reading parameters, that those of its sources fit its networks; raises
        ValueError if not. Some of the sources may be planned.
      draw: (config, splits) -> its training and test images, for a phase that trains on a few
        images drawn from the training split; ValueError if there are too few.
      table: workdir -> its own table in the report, or None.
      folder: folder of its run in a pipeline.
      makes: field of config.sources that names its workdir in later phases.
      replaceable: whether a workdir in config.sources.MAKES replaces it in a pipeline.
      optional: whether a pipeline skips it if it has no recipe.
      files: the kinds of published files that correspond to it.
    """

    describe: Callable[[Config, Mesh], Training]
    run: Callable[[Config, epath.Path, Mesh, Splits | None], dict[str, Any]]
    role: str
    reads: tuple[str, ...]
    differentiates: tuple[str, ...]
    sources: tuple[WeightSource, ...] = ()
    modular: bool = False
    ood: bool = False
    evaluators: tuple[str, ...] = ("classification",)
    feed: Callable[..., Feed] = config_feed
    fit: Callable[[Training, Planned], None] = lambda training, planned: None
    draw: Callable[[Config, Splits], tuple[Episode, Episode]] | None = None
    table: Callable[[epath.Path], Table | None] = lambda workdir: None
    folder: str
    makes: str = ""
    replaceable: bool = False
    optional: bool = False
    files: tuple[FileKind, ...] = ()

    def all_reads(self) -> tuple[str, ...]:
        """Config sections and fields that it reads; setting any others has no effect."""
        ood = ("ood",) if self.ood else ()
        sources = tuple(source.path for source in self.sources)
        # Both are about loaded weights, so a phase that loads none does not read them.
        allowances = ALLOWANCES if sources else ()
        return (*ALWAYS, *RECIPE, *self.reads, *ood, *sources, *allowances)

    def used_sources(self, config: Config) -> tuple[WeightSource, ...]:
        """The sources that a run of `config` takes weights from."""
        return tuple(source for source in self.sources if source.used(config))
