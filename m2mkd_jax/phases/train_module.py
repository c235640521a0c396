"""Phase train_module (MT): teacher modules, each trained in its place inside the frozen meta
model."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Origin
from m2mkd_jax.config import Config
from m2mkd_jax.hybrid import finish, replace_stage, shared_tokens
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


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the modules of the teacher that config.module names, from scratch; their parameters
    are saved under "module/stage_K"."""
    training = describe(config, mesh)
    meta = require_source(config, "meta")
    origins = [Origin(meta, f"meta/{name}", f"meta/{name}") for name in training.helpers["meta"]]
    helpers = take_weights(config, training.helpers, origins, frozen=True).params
    return train_phase(training, workdir, mesh, helpers=helpers)


def describe(config: Config, mesh: Mesh) -> Training:
    """The modules of config.module, each in a hybrid whose other stages are the meta model's and
    stay as they are.

    Stochastic depth ramps over, and acts on, meta and module blocks alike (as the original has it).
    """
    meta, teacher, stages = meta_network(config), teacher_network(config), config.modules()
    hybrids = {
        stage: encoder.ramp_drop_path(replace_stage(meta, stage, teacher), config.drop_path)
        for stage in stages
    }
    others = tuple(i for i in range(len(meta)) if stages != (i,))

    def forward(params, helpers, images, train, rngs):
        hidden = shared_tokens(hybrids, helpers["meta"], images, train=train, rngs=rngs)
        logits, _ = finish(
            hybrids,
            helpers["meta"],
            params["module"],
            hidden,
            train=train,
            train_meta=train,
            rngs=rngs,
        )
        return {f"module_{stage}": Outputs(logits[stage], None, {}) for stage in stages}

    return Training(
        config,
        title=f"{config.phase} {config.module}",
        init=lambda key: {"module": teacher.init(key, only=stages)},
        rules=vit.PARTITION_RULES,
        forward=forward,
        helpers=wanted(meta, "meta", mesh, vit.PARTITION_RULES, only=others),
        clip_depth=2,
    )
