"""Phase distill (m2mKD): student modules learn from teacher modules, each pair inside the meta
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


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the student modules of config.module; their parameters are saved under
    "student/stage_K"."""
    training = describe(config, mesh)
    meta, teacher = (require_source(config, role) for role in ("meta", "teacher"))
    names = [f"teacher/{name}" for name in training.helpers["teacher"]]
    origins = [Origin(meta, "meta", "meta"), *(Origin(teacher, name, name) for name in names)]
    helpers = take_weights(config, training.helpers, origins, frozen=True).params
    return train_phase(training, workdir, mesh, helpers=helpers)


def describe(config: Config, mesh: Mesh) -> Training:
    """The student modules of config.module, helped by the meta model and as many modules of the
    teacher."""
    stages = config.modules()
    pair = Pair(
        meta=meta_network(config),
        teacher=teacher_network(config),
        student=student_modules(config, drop_path=config.drop_path),
    )

    def forward(params, helpers, images, train, rngs):
        taught, logits, recorded = pair_logits(
            pair, {**helpers, **params}, images, stages=stages, train=train, rngs=rngs
        )
        return {
            f"module_{stage}": Outputs(
                logits[stage], taught[stage], {stage_name(stage): recorded[stage_name(stage)]}
            )
            for stage in stages
        }

    rules = vit.PARTITION_RULES
    return Training(
        config,
        title=f"{config.phase} {config.module}",
        init=lambda key: {"student": pair.student.init(key, only=stages)},
        rules=family(config).rules,
        forward=forward,
        helpers=wanted(pair.meta, "meta", mesh, rules)
        | wanted(pair.teacher, "teacher", mesh, rules, only=stages),
        clip_depth=2,
        distill=config.distill,
    )
