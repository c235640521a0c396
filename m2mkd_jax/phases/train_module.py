"""Phase train_module (MT): one teacher module, trained in its place inside the frozen meta
model."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Origin
from m2mkd_jax.config import Config
from m2mkd_jax.hybrid import replace_stage
from m2mkd_jax.models import encoder, vit
from m2mkd_jax.phases.networks import (
    meta_network,
    require_source,
    take_weights,
    teacher_network,
    wanted,
)
from m2mkd_jax.phases.objective import Outputs
from m2mkd_jax.phases.training import Training, train_phase


def run(config: Config, workdir: epath.Path, mesh: Mesh, stage: int) -> dict[str, Any]:
    """Trains module `stage` of the teacher from scratch; its parameters are saved under
    "module/stage_K"."""
    training = describe(config, mesh, stage)
    meta = require_source(config, "meta")
    origins = [Origin(meta, f"meta/{name}", f"meta/{name}") for name in training.helpers["meta"]]
    helpers = take_weights(config, training.helpers, origins).params
    return train_phase(training, workdir, mesh, helpers=helpers)


def describe(config: Config, mesh: Mesh, stage: int) -> Training:
    """Module `stage` in the hybrid, whose other stages are the meta model's and stay as they are.

    Stochastic depth ramps over, and acts on, meta and module blocks alike (as the original has it).
    """
    meta = meta_network(config)
    hybrid = replace_stage(meta, stage, teacher_network(config))
    hybrid = encoder.ramp_drop_path(hybrid, config.drop_path)
    others = tuple(i for i in range(len(meta)) if i != stage)

    def forward(params, helpers, images, train, rngs):
        stages = {**helpers["meta"], **params["module"]}
        logits, recorded = hybrid.apply(stages, images, train=train, rngs=rngs)
        return Outputs(logits, None, recorded)

    return Training(
        config,
        title=f"{config.phase} {stage}",
        init=lambda key: {"module": hybrid.init(key, only=(stage,))},
        rules=vit.PARTITION_RULES,
        forward=forward,
        helpers=wanted(meta, "meta", mesh, vit.PARTITION_RULES, only=others),
    )
