"""Phase end_to_end: the whole V-MoE, from distilled students (FT) or from scratch (E2E)."""

from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Allowance, Origin
from m2mkd_jax.config import Config
from m2mkd_jax.models import vit, vmoe
from m2mkd_jax.phases.networks import (
    require_source,
    require_stage_sources,
    take_weights,
    teacher_network,
    wanted,
    whole_student,
)
from m2mkd_jax.phases.objective import Forward, whole_forward
from m2mkd_jax.phases.training import train_phase
from m2mkd_jax.stages import Network, stage_name

DROPPED = Allowance(
    r"student/stage_\d+/block_\d+/(pre|post)_stitch/.*", "config.model.stitches='dropped'"
)


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the V-MoE; its parameters are saved under "student".

    It starts from the students of config.sources.students, or from scratch where there are none;
    config.baseline adds distillation from the logits of the whole teacher.
    """
    network = whole_student(config, drop_path=config.drop_path)
    warm_start = None
    if config.sources.students:
        sources = require_stage_sources(config, "students", len(network))
        origins = [
            Origin(source, f"student/{stage_name(i)}", f"student/{stage_name(i)}")
            for i, source in enumerate(sources)
        ]
        leave = (DROPPED,) if config.model.stitches == "dropped" else ()
        warm_start = lambda wanted: take_weights(config, wanted, origins, leave=leave)  # noqa: E731

    forward, helpers = whole_forward(network, "student"), {}
    if config.baseline.kind != "none":
        teacher = teacher_network(config)
        origin = Origin(require_source(config, "teacher"), "teacher", "teacher")
        needed = wanted(teacher, "teacher", mesh, vit.PARTITION_RULES)
        helpers = take_weights(config, needed, [origin]).params
        forward = _taught(forward, teacher)

    return train_phase(
        config,
        workdir,
        mesh,
        title=config.phase,
        init=lambda key: {"student": network.init(key)},
        rules=vmoe.PARTITION_RULES,
        forward=forward,
        helpers=helpers,
        warm_start=warm_start,
        distill=config.baseline,
    )


def _taught(student: Forward, teacher: Network) -> Forward:
    """The student's forward pass with the logits of the whole teacher on the same images."""

    def forward(params, helpers, images, train, rngs):
        logits, _ = teacher.apply(helpers["teacher"], images)
        outputs = student(params, helpers, images, train, rngs)
        return outputs._replace(teacher=jax.lax.stop_gradient(logits))

    return forward
