"""Phase distill (m2mKD): one student module learns from one teacher module, both inside the meta
model."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Origin
from m2mkd_jax.config import Config
from m2mkd_jax.hybrid import Pair, pair_logits
from m2mkd_jax.models import vit
from m2mkd_jax.phases.families import family, student_modules
from m2mkd_jax.phases.networks import (
    meta_network,
    require_source,
    take_weights,
    teacher_network,
    wanted,
)
from m2mkd_jax.phases.objective import Outputs
from m2mkd_jax.phases.training import Training, train_phase
from m2mkd_jax.stages import stage_name


def run(config: Config, workdir: epath.Path, mesh: Mesh, stage: int) -> dict[str, Any]:
    """Trains student module `stage`; its parameters are saved under "student/stage_K"."""
    training, name = describe(config, mesh, stage), stage_name(stage)
    origins = [
        Origin(require_source(config, "meta"), "meta", "meta"),
        Origin(require_source(config, "teacher"), f"teacher/{name}", f"teacher/{name}"),
    ]
    helpers = take_weights(config, training.helpers, origins).params
    return train_phase(training, workdir, mesh, helpers=helpers)


def describe(config: Config, mesh: Mesh, stage: int) -> Training:
    """Student module `stage`, helped by the meta model and one module of the teacher."""
    pair = Pair(
        meta=meta_network(config),
        teacher=teacher_network(config),
        student=student_modules(config, drop_path=config.drop_path),
    )

    def forward(params, helpers, images, train, rngs):
        teacher, student, recorded = pair_logits(
            pair, {**helpers, **params}, images, stage=stage, train=train, rngs=rngs
        )
        return Outputs(student, teacher, {stage_name(stage): recorded})

    rules = vit.PARTITION_RULES
    return Training(
        config,
        title=f"{config.phase} {stage}",
        init=lambda key: {"student": pair.student.init(key, only=(stage,))},
        rules=family(config).rules,
        forward=forward,
        helpers=wanted(pair.meta, "meta", mesh, rules)
        | wanted(pair.teacher, "teacher", mesh, rules, only=(stage,)),
        distill=config.distill,
    )
