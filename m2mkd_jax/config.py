"""The config of an m2mkd_jax run: one frozen dataclass with all defaults."""

import dataclasses
from typing import Annotated

import ml_collections
from jax import numpy as jnp

from common_jax.command_line import System
from common_jax.config import FieldError, Section
from common_jax.mesh import MeshConfig
from common_jax.nn.dense import MatmulPrecision
from common_jax.optim import OptimConfig
from common_jax.ranges import (
    LONGEST,
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
from common_jax.run_config import RunConfig, apply_recipe
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.ood import OodConfig
from m2mkd_jax.data.sources import DataConfig
from m2mkd_jax.evaluators import EVALUATORS
from m2mkd_jax.families import FAMILIES, Context, family_of, kind_of, section_type
from m2mkd_jax.losses import COMBINATIONS, DISTILLATIONS
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.regularizers import RegularizersConfig

# In the order of the pipeline. Not taken from `m2mkd_jax.phases.PHASES`, which needs this module;
# a test compares the two.
PHASE_NAMES = ("pretrain_meta", "train_module", "assemble", "distill", "end_to_end", "few_shot")
SYSTEM = System("m2mkd_jax", field="phase", others={"stage": "cliptrans_jax"})
Meta, Teacher, Student = (section_type(role) for role in ("meta", "teacher", "model"))
NOISES = ("mean", "fixed", "sampled")
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class DistillConfig(Section):
    """m2mKD's objective, (1 - alpha) label loss + alpha distillation.

    Attributes:
      kind: "soft" (as in the original, averaged over labels too), "soft_batch_mean", "hard" or
        "none".
      alpha: weight of the distillation term.
      tau: temperature of soft distillation.
      combine: how to use several teachers: average their "losses", or distill from a single
        teacher made by averaging their softened "probabilities" or their "logits".
    """

    kind: Annotated[str, one_of(*DISTILLATIONS, "none")] = "soft"
    alpha: Fraction = 0.5
    tau: Positive = 1.0
    combine: Annotated[str, one_of(*COMBINATIONS)] = "losses"

    @property
    def active(self) -> bool:
        """True unless the kind is "none"."""
        return self.kind != "none"


@dataclasses.dataclass(frozen=True)
class ModuleDistillConfig(DistillConfig):
    """m2mKD's objective, the number of modules per program, and which teachers teach which module.

    Attributes:
      pairs_at_once: maximum number of modules that one program trains; the others are trained by
        further programs, one after another. 0 trains all in one program.
      teachers: for each stage, which of config.sources.teachers teach its module, as indices such
        as ("0", "0+1", "1"). () lets all of them teach every module.
    """

    pairs_at_once: Count = 0
    teachers: tuple[Name, ...] = ()


@dataclasses.dataclass(frozen=True)
class FewShotConfig(Section):
    """An episode: `ways` classes of `shots` training images each, drawn with `seed`.

    Attributes:
      ways: number of classes.
      shots: training images per class.
      test_shots: test images per class, from the test split.
      seed: seed of the draw.
      test_on_train: draws the test images from the training split, so that they include all
        training images, as the original does on CIFAR-100. Only for comparison with published
        numbers.
      episodes: number of episodes, with seeds `seed`, `seed` + 1 and so on; if more than 1, the
        result is their mean with a 95 % confidence interval.
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
      meta: workdir of the meta model.
      modules: workdirs of the trained modules, one per stage in order, or one that has all of them.
      teacher: workdir of the teacher.
      teachers: workdirs of several teachers, instead of `teacher`: ViTs of any size, each from a
        run of phase pretrain_meta, train_module or assemble, or converted.
      students: workdirs of the distilled students, one per stage in order, or one that has all of
        them. () trains from scratch.
      network: workdir of a trained whole student.
      fresh: regex of parameter paths that start from scratch even if a source has them.
      leave: regex of parameter paths in the sources that may be left out if the network has no
        such parameters.
    """

    meta: str = ""
    modules: tuple[Name, ...] = ()
    teacher: str = ""
    teachers: tuple[Name, ...] = ()
    students: tuple[Name, ...] = ()
    network: str = ""
    fresh: Regex = ""
    leave: Regex = ""


@dataclasses.dataclass(frozen=True)
class InitConfig(Section):
    """Initialisation from a network of another kind of run.

    Attributes:
      upcycle: workdir (or a step in it) of a dense ViT, trained or converted, that a V-MoE starts
        from, see `m2mkd_jax.families.upcycle`. "" starts from scratch.
      teacher: workdir (or a step in it) of a whole ViT, trained or converted, whose modules are
        joined to the meta model: only their stitches and the head are trained. "" trains the
        modules from scratch.
    """

    upcycle: str = ""
    teacher: str = ""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    """Random numbers in evaluation, for networks that draw any there.

    Attributes:
      noise: "mean" draws nothing: random states are replaced by their means, and pooling has no
        noise; "fixed" draws the same numbers in every evaluation, from the seed and the batch
        number; "sampled" draws new ones each time, since the step enters the key as well.
    """

    noise: Annotated[str, one_of(*NOISES)] = "mean"


def check_mixing(section: "Recipe | Config") -> None:
    """Raises FieldError if examples are mixed in pairs but the batch is odd."""
    optim = section.optim
    if section.augment.mixes and optim.micro_batch % 2:
        raise FieldError(
            f"optim.batch={optim.batch} / accumulate={optim.accumulate} must be even, since "
            "augment mixes examples in pairs"
        )


@dataclasses.dataclass(frozen=True)
class Recipe(Section):
    """The training recipe of one phase.

    Attributes:
      optim: optimizer and length.
      augment: augmentation of training images and labels.
      drop_path: stochastic depth rate of the last block; it ramps up linearly from 0 at the first.
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
      phase: one of PHASE_NAMES, or "pipeline".
      module: the modules to train, in phases that train modules: "all", or stage numbers such as
        "2" or "0+3".
      seed: seed of all random numbers.
      precision: compute dtype of the networks, "float32" or "bfloat16"; parameters, softmax,
        router, norm statistics and losses are always float32.
      matmul_precision: precision of float32 matrix products on GPUs and TPUs: "default", the
        fastest (TF32 on a GPU, bfloat16 on a TPU), "high", or "highest", which is full float32. It
        affects neither CPUs nor products in bfloat16.
      data: images and labels.
      ood: a second test set with some of the classes; evaluated for whole networks, not for single
        modules or episodes.
      evaluation: random numbers in evaluation.
      meta: the meta model; its depths define the stages.
      teacher: the teacher, with the same number of stages as the meta model; each of
        sources.teachers brings its own section instead.
      model: the student, of kind "vmoe" or "nac", with the same number of stages.
      regularizers: terms that keep a NAC's graph near its prior, when it is trained as a whole.
      distill: m2mKD's objective, the number of modules trained at once, and their teachers.
      baseline: distillation of the whole student from the whole teacher's logits; none by default.
      few_shot: the few-shot episode.
      sources: weights to start from.
      init: initialisation of a whole student without distilled students, or of modules from a
        trained ViT.
      optim, augment, drop_path: the phase's recipe, see Recipe; the pipeline has recipes instead.
      recipes: the recipe of each phase of the pipeline.
      mesh: devices.
      run: logging, evaluation, checkpoints.
    """

    phase: Annotated[str, one_of(*PHASE_NAMES, "pipeline")] = "end_to_end"
    module: str = "all"
    seed: Seed = 0
    precision: Annotated[str, key_of(lambda: PRECISIONS)] = "float32"
    matmul_precision: MatmulPrecision = "default"
    data: DataConfig = DataConfig()
    ood: OodConfig = OodConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    meta: Meta = ViTConfig()
    teacher: Teacher = ViTConfig()
    model: Student = VMoEConfig()
    regularizers: RegularizersConfig = RegularizersConfig()
    distill: ModuleDistillConfig = ModuleDistillConfig()
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
        student = family_of(self.model)
        student.check_noise(self.model, self.evaluation.noise)
        if self.init.upcycle and self.sources.students:
            raise FieldError(
                f"init.upcycle={shown(self.init.upcycle)} and "
                f"sources.students={shown(self.sources.students)}: a network starts from only one "
                "of them"
            )
        if self.init.upcycle and student.upcycle is None:
            kinds = [kind for kind, family in FAMILIES.items() if family.upcycle is not None]
            raise FieldError(
                f"init.upcycle={shown(self.init.upcycle)} starts only networks of kind {kinds} "
                f"from a ViT, but model.kind={kind_of(self.model)!r}: leave it out, or change the "
                "kind"
            )
        if self.sources.teacher and self.sources.teachers:
            raise FieldError(
                f"sources.teachers={shown(self.sources.teachers)} and "
                f"sources.teacher={shown(self.sources.teacher)}: name all teachers in "
                "sources.teachers"
            )
        if unknown := set(self.recipes) - set(PHASE_NAMES):
            raise FieldError(f"recipes has no phases {shown(unknown)}, only {PHASE_NAMES}")
        if self.run.best is not None:
            split, _, name = self.run.best.partition("/")
            names = [metric for one in EVALUATORS.values() for metric in one.shown]
            if split not in ("test", "ood") or name.rpartition("/")[2] not in names:
                raise FieldError(
                    f"run.best={shown(self.run.best)} must be a metric of test/ or ood/, "
                    f"{' or '.join(names)}, such as 'test/accuracy', or None"
                )
        # Only for their errors, which name fields.
        self.modules()
        self.taught_by()

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype of the networks."""
        return PRECISIONS[self.precision]

    @property
    def interface(self) -> Interface:
        """Input and output of every network of the run."""
        return Interface(self.data.image_size, self.data.channels, self.data.labels)

    @property
    def context(self) -> Context:
        """Settings that every network needs besides its own section."""
        tokens = family_of(self.meta).tokens
        return Context(
            interface=self.interface,
            dtype=self.dtype,
            seed=self.seed,
            meta_width=self.meta.width,
            meta_tokens=lambda: tokens(self.meta, self.interface),
        )

    def modules(self) -> tuple[int, ...]:
        """The stages that `module` names; raises FieldError for an unknown stage or one that is
        named twice."""
        count = len(self.meta.depths)
        if self.module == "all":
            return tuple(range(count))
        try:
            stages = tuple(int(text) for text in self.module.split("+"))
        except ValueError:
            stages = (count,)  # out of range, so refused below
        if not set(stages) <= set(range(count)) or len(set(stages)) < len(stages):
            raise FieldError(
                f"module={shown(self.module)} must be 'all' or stages from 0 to {count - 1}, "
                "each once, such as '2' or '0+3'"
            )
        return tuple(sorted(stages))

    def taught_by(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the indices of the `sources.teachers` that teach its module.

        Raises FieldError if `distill.teachers` does not have one entry per stage, or an entry names
        no teacher.
        """
        table, stages = self.distill.teachers, len(self.meta.depths)
        count = len(self.sources.teachers)
        if not table:
            return (tuple(range(count)),) * stages
        if len(table) != stages:
            raise FieldError(
                f"distill.teachers={shown(table)} must have an entry for each of the {stages} "
                "stages, or be () to let all teachers teach every module"
            )
        numbers = []
        for stage, text in enumerate(table):
            named = [int(one) if one.isdecimal() else count for one in text[:LONGEST].split("+")]
            if max(named) >= count or len(set(named)) < len(named):
                raise FieldError(
                    f"distill.teachers[{stage}]={shown(text)} must be indices of the "
                    f"{count} config.sources.teachers, from 0, each once, such as '0' or '0+1'"
                )
            numbers.append(tuple(named))
        return tuple(numbers)

    def programs(self) -> list["Config"]:
        """The config of each program of a modular phase, with at most `distill.pairs_at_once`
        modules."""
        stages = self.modules()
        size = self.distill.pairs_at_once or len(stages)
        if len(stages) <= size:
            return [self]
        parts = (stages[i : i + size] for i in range(0, len(stages), size))
        return [dataclasses.replace(self, module="+".join(map(str, part))) for part in parts]


def choose_recipe(
    config: ml_collections.ConfigDict, recipes: dict[str, Recipe]
) -> ml_collections.ConfigDict:
    """Fills in the recipe of `config.phase`; the pipeline gets all recipes under `recipes`.

    Args:
      config: a ConfigDict of `Config` with its phase set; it is modified and returned.
      recipes: the recipes by phase.

    Raises:
      ValueError: if the phase has no recipe.
    """
    return apply_recipe(config, recipes, kind="phase")
