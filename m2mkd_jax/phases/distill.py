"""Phase distill (m2mKD): student modules learn from teacher modules, each pair inside the meta
model."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Origin
from m2mkd_jax.config import Config
from m2mkd_jax.hybrid import Pair, pair_logits
from m2mkd_jax.phases.networks import (
    check_exchange,
    family_of_role,
    meta_network,
    parameter_shapes,
    student_modules,
    teacher_network,
)
from m2mkd_jax.phases.objective import Outputs
from m2mkd_jax.phases.phase import FileKind, Phase, Training, WeightSource
from m2mkd_jax.phases.training import train_phase
from m2mkd_jax.phases.weights import require_source, take_weights
from m2mkd_jax.stages import module_name, stage_name


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the student modules of config.module and saves them under "student/stage_K"."""
    training = describe(config, mesh)
    meta, teacher = (require_source(config, role) for role in ("meta", "teacher"))
    names = [f"teacher/{name}" for name in training.helpers["teacher"]]
    origins = [Origin(meta, "meta", "meta"), *(Origin(teacher, name, name) for name in names)]
    helpers = take_weights(config, training.helpers, origins, frozen=True).params
    return train_phase(training, workdir, mesh, helpers=helpers)


def describe(config: Config, mesh: Mesh) -> Training:
    """The student modules of config.module; the meta model and as many teacher modules help."""
    check_exchange(config, "meta", "teacher", "student")
    stages = config.modules()
    pair = Pair(
        meta=meta_network(config),
        teacher=teacher_network(config),
        student=student_modules(config, drop_path=config.drop_path),
    )

    def forward(params, helpers, images, train, rngs):
        teacher, student, recorded = pair_logits(
            pair, {**helpers, **params}, images, stages=stages, train=train, rngs=rngs
        )
        return {
            module_name(stage): Outputs(
                student[stage], teacher[stage], {stage_name(stage): recorded[stage_name(stage)]}
            )
            for stage in stages
        }

    return Training(
        PHASE,
        config,
        init=lambda key: {"student": pair.student.init(key, only=stages)},
        rules=family_of_role(config, "student").rules,
        forward=forward,
        helpers=parameter_shapes(config, pair.meta, "meta", mesh)
        | parameter_shapes(config, pair.teacher, "teacher", mesh, only=stages),
        distill=config.distill,
    )


PHASE = Phase(
    describe=describe,
    run=run,
    role="student",
    modular=True,
    reads=("module", "meta", "teacher", "model", "distill"),
    differentiates=("model", "meta"),
    sources=(WeightSource("meta"), WeightSource("teacher")),
    folder="students",
    makes="students",
    files=(
        FileKind("{family}_student", "a {network} student module, or a folder of all", single=True),
    ),
)
