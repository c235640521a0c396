"""The config of a run of m2mkd_jax: one frozen dataclass, whose defaults are the only ones."""

import dataclasses
from typing import Annotated

import ml_collections
from jax import numpy as jnp

from common_jax.command_line import System
from common_jax.config import FieldError, Section, unfreeze
from common_jax.loop import RunConfig
from common_jax.mesh import MeshConfig
from common_jax.optim import OptimConfig
from common_jax.ranges import (
    SEEDS,
    BelowOne,
    Count,
    Fraction,
    Name,
    Positive,
    Regex,
    Seed,
    Size,
    key_of,
    one_of,
    shown,
)
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.ood import OodConfig
from m2mkd_jax.data.sources import DataConfig
from m2mkd_jax.losses import DISTILLATIONS
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.regularizers import RegularizersConfig

PHASES = (
    "pretrain_meta",
    "train_module",
    "assemble",
    "distill",
    "end_to_end",
    "few_shot",
)
SYSTEM = System("m2mkd_jax", field="phase", others={"stage": "cliptrans_jax"})
# Sections and fields that the phases read; a flag or a sweep of any other changes nothing.
_ANY = ("phase", "seed", "precision", "data", "evaluation", "mesh", "run")
_ONE = (*_ANY, "optim", "augment", "drop_path")
_TAKE = ("sources.fresh", "sources.leave")
READS: dict[str, tuple[str, ...]] = {
    "pretrain_meta": (*_ONE, "meta", "ood"),
    "train_module": (
        *_ONE, "module", "meta", "teacher", "distill.pairs_at_once", "sources.meta", *_TAKE,
    ),
    "assemble": (*_ONE, "teacher", "ood", "sources.modules", *_TAKE),
    "distill": (
        *_ONE, "module", "meta", "teacher", "model", "distill", "sources.meta", "sources.teacher",
        *_TAKE,
    ),
    # Stitches that a V-MoE keeps are as wide as the meta model.
    "end_to_end": (
        *_ONE, "meta.width", "teacher", "model", "regularizers", "baseline", "ood", "init",
        "sources.students", "sources.teacher", *_TAKE,
    ),
    "few_shot": (*_ONE, "meta.width", "model", "few_shot", "sources.network", *_TAKE),
    "pipeline": (
        *_ANY, "meta", "teacher", "model", "regularizers", "distill", "baseline", "few_shot", "ood",
        "sources.meta", "sources.teacher", *_TAKE, "recipes",
    ),
}  # fmt: skip
NOISES = ("mean", "fixed", "sampled")
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class DistillConfig(Section):
    """m2mKD's objective, (1 - alpha) label loss + alpha distillation.

    Attributes:
      kind: "soft" (the original's, a mean over labels too), "soft_batch_mean", "hard" or "none".
      alpha: weight of the distillation.
      tau: temperature of soft distillation.
    """

    kind: Annotated[str, one_of(*DISTILLATIONS, "none")] = "soft"
    alpha: Fraction = 0.5
    tau: Positive = 1.0


@dataclasses.dataclass(frozen=True)
class PairsConfig(DistillConfig):
    """m2mKD's objective, and how many modules one program trains.

    Attributes:
      pairs_at_once: the most modules that distill and train_module train in one program, where
        config.module names several; those left over follow in further programs. 0: all in one.
    """

    pairs_at_once: Count = 0


@dataclasses.dataclass(frozen=True)
class FewShotConfig(Section):
    """An episode: `ways` classes of `shots` training images each, drawn with `seed`.

    Attributes:
      ways: classes drawn.
      shots: training images a class.
      test_shots: test images a class, from the test split.
      seed: of the draw.
      test_on_train: draws the test images from the training split, so that all training images are
        among them, as the original does on CIFAR-100: for comparison with published numbers only.
      episodes: how many are run, with `seed`, `seed` + 1 and so on; above 1 the result is their
        mean with its 95 % confidence interval.
    """

    ways: Size = 8
    shots: Size = 5
    test_shots: Size = 15
    seed: Seed = 1
    test_on_train: bool = False
    episodes: Size = 1

    def __post_init__(self):
        super().__post_init__()
        if self.seed + self.episodes > SEEDS:
            raise FieldError(
                f"seed={self.seed} and episodes={self.episodes}: the last episode's seed, "
                f"{self.seed + self.episodes - 1}, must be below 2^32"
            )


@dataclasses.dataclass(frozen=True)
class SourcesConfig(Section):
    """Workdirs (or steps in them) that a phase takes weights from.

    Attributes:
      meta: of the meta model; for train_module and distill.
      modules: of the trained modules, one a stage in order, or one that holds them all; for
        assemble.
      teacher: of the teacher; for distill, and for end_to_end with whole-teacher distillation.
      students: of the distilled students, one a stage in order, or one that holds them all; for
        end_to_end. () trains from scratch.
      network: of a trained V-MoE or NAC; for few_shot.
      fresh: regex of parameter paths that start anew even though a source may have them.
      leave: regex of parameter paths of the sources that may find no place.
    """

    meta: str = ""
    modules: tuple[Name, ...] = ()
    teacher: str = ""
    students: tuple[Name, ...] = ()
    network: str = ""
    fresh: Regex = ""
    leave: Regex = ""


@dataclasses.dataclass(frozen=True)
class InitConfig(Section):
    """How the whole V-MoE of end_to_end starts, where it is not from students.

    Attributes:
      upcycle: workdir (or a step in it) of a dense ViT, trained or converted: every expert starts
        as the MLP of its block, router and stitches start anew, all else is taken. "" starts from
        scratch.
    """

    upcycle: str = ""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    """What networks that draw at random outside training too (NAC) do in evaluation.

    Attributes:
      noise: "mean" draws nothing: means stand in for random states, and pooling has no noise;
        "fixed" draws the same at every evaluation, from the seed and a batch's number; "sampled"
        draws anew, from the step as well.
    """

    noise: Annotated[str, one_of(*NOISES)] = "mean"


def check_mixing(section: "Recipe | Config") -> None:
    """Raises FieldError where examples are mixed in pairs and the batch is odd."""
    optim = section.optim
    if section.augment.mixes and optim.micro_batch % 2:
        raise FieldError(
            f"optim.batch={optim.batch} / accumulate={optim.accumulate} must be even, since "
            "augment mixes examples in pairs"
        )


@dataclasses.dataclass(frozen=True)
class Recipe(Section):
    """How one phase trains.

    Attributes:
      optim: optimizer and length.
      augment: what happens to training images and labels.
      drop_path: stochastic depth of the last block, to which it ramps from the first.
    """

    optim: OptimConfig = OptimConfig()
    augment: AugmentConfig = AugmentConfig()
    drop_path: BelowOne = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_mixing(self)


@dataclasses.dataclass(frozen=True)
class Config(Section):
    """A run of one phase, or of all of them (`phase="pipeline"`).

    Attributes:
      phase: one of PHASES, or "pipeline".
      module: which modules train_module and distill train: "all", or stage numbers such as "2" or
        "0+3".
      seed: of everything random.
      precision: what the networks compute in, "float32" or "bfloat16"; parameters, softmax,
        router, norm statistics and losses are float32 in any case.
      data: images and labels.
      ood: a further test set, of some of the classes, for whole networks; single modules and
        few_shot are not tested on it.
      evaluation: whether anything random is drawn in evaluation.
      meta: the meta model; its stages are the depths.
      teacher: the teacher, with as many stages.
      model: the student, a V-MoE or (with kind "nac") a NAC, with as many stages.
      regularizers: what holds a NAC's graph in shape in end_to_end.
      distill: m2mKD's objective, and how many modules are trained at once.
      baseline: distillation of end_to_end from the whole teacher's logits; kind "none" for none.
      few_shot: the episode.
      sources: weights to start from.
      init: how end_to_end starts where it is not from students.
      optim, augment, drop_path: how the phase trains, see Recipe; the pipeline has recipes instead.
      recipes: how each phase of the pipeline trains.
      mesh: devices.
      run: logging, evaluation, checkpoints.
    """

    phase: Annotated[str, one_of(*PHASES, "pipeline")] = "end_to_end"
    module: str = "all"
    seed: Seed = 0
    precision: Annotated[str, key_of(lambda: PRECISIONS)] = "float32"
    data: DataConfig = DataConfig()
    ood: OodConfig = OodConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    meta: ViTConfig = ViTConfig()
    teacher: ViTConfig = ViTConfig()
    model: VMoEConfig | NacConfig = VMoEConfig()
    regularizers: RegularizersConfig = RegularizersConfig()
    distill: PairsConfig = PairsConfig()
    baseline: DistillConfig = DistillConfig(kind="none")
    few_shot: FewShotConfig = FewShotConfig()
    sources: SourcesConfig = SourcesConfig()
    init: InitConfig = InitConfig()
    optim: OptimConfig = OptimConfig()
    augment: AugmentConfig = AugmentConfig()
    drop_path: BelowOne = 0.0
    recipes: dict[str, Recipe] = dataclasses.field(default_factory=dict)
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self):
        super().__post_init__()
        check_mixing(self)
        kernel = self.model.kernel if isinstance(self.model, NacConfig) else None
        if kernel and kernel.evaluation == "sample" and self.evaluation.noise == "mean":
            raise FieldError(
                "model.kernel.evaluation='sample' draws edges and evaluation.noise='mean' draws "
                "nothing: change either"
            )
        if self.init.upcycle and self.phase != "end_to_end":
            raise FieldError(
                f"init.upcycle={shown(self.init.upcycle)} is for phase='end_to_end' and "
                f"phase={self.phase!r}: leave it out"
            )
        if self.init.upcycle and self.sources.students:
            raise FieldError(
                f"init.upcycle={shown(self.init.upcycle)} and "
                f"sources.students={shown(self.sources.students)}: a network starts from one of "
                "them"
            )
        if self.init.upcycle and isinstance(self.model, NacConfig):
            raise FieldError(
                f"init.upcycle={shown(self.init.upcycle)} makes a V-MoE of a ViT and "
                "model.kind='nac': leave it out, or give a V-MoE"
            )
        if unknown := set(self.recipes) - set(PHASES):
            raise FieldError(f"recipes has no phases {shown(unknown)}, only {PHASES}")
        if self.run.best is not None and not self.run.best.startswith(("test/", "ood/")):
            raise FieldError(
                f"run.best={shown(self.run.best)} must be a metric of test/ or ood/, such as "
                "'test/accuracy', or None"
            )
        self.modules()

    @property
    def dtype(self) -> jnp.dtype:
        """What the networks compute in."""
        return PRECISIONS[self.precision]

    @property
    def interface(self) -> Interface:
        """What every network of the run takes and gives."""
        return Interface(self.data.image_size, self.data.channels, self.data.labels)

    def modules(self) -> tuple[int, ...]:
        """The stages that `module` names; raises ValueError for one that is not there, or twice."""
        count = len(self.meta.depths)
        if self.module == "all":
            return tuple(range(count))
        try:
            stages = tuple(int(text) for text in self.module.split("+"))
        except ValueError:
            stages = (count,)
        if not set(stages) <= set(range(count)) or len(set(stages)) < len(stages):
            raise FieldError(
                f"module={shown(self.module)} must be 'all' or stages from 0 to {count - 1}, "
                "each once, such as '2' or '0+3'"
            )
        return tuple(sorted(stages))

    def programs(self) -> list["Config"]:
        """The config of each program of a modular phase, with as many of the modules as
        `distill.pairs_at_once` allows."""
        stages = self.modules()
        size = self.distill.pairs_at_once or len(stages)
        if len(stages) <= size:
            return [self]
        parts = (stages[i : i + size] for i in range(0, len(stages), size))
        return [dataclasses.replace(self, module="+".join(map(str, part))) for part in parts]


def choose_recipe(
    config: ml_collections.ConfigDict, recipes: dict[str, Recipe]
) -> ml_collections.ConfigDict:
    """Puts the recipe of `config.phase` in place; the pipeline gets all of them under `recipes`.

    Args:
      config: a ConfigDict of `Config` with its phase set.
      recipes: one a phase.

    Raises:
      ValueError: when there is none for the phase.
    """
    if config.phase == "pipeline":
        for name in (field.name for field in dataclasses.fields(Recipe)):
            del config[name]
        config.recipes = unfreeze(recipes)
        return config
    if config.phase not in recipes:
        raise ValueError(
            f"phase={config.phase!r} has no recipe here; choose one of {[*recipes, 'pipeline']}"
        )
    for name, section in unfreeze(recipes[config.phase]).items():
        config[name] = section
    return config
