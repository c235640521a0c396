"""Phase train_module (MT): trains teacher modules, each in its place inside the frozen meta
model."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Origin
from m2mkd_jax.config import Config
from m2mkd_jax.hybrid import finish, replace_stage, shared_tokens
from m2mkd_jax.models import encoder
from m2mkd_jax.phases.networks import (
    check_exchange,
    family_of_role,
    meta_network,
    module_network,
    parameter_shapes,
)
from m2mkd_jax.phases.objective import Outputs
from m2mkd_jax.phases.phase import FileKind, Phase, Training, WeightSource
from m2mkd_jax.phases.training import train_phase
from m2mkd_jax.phases.weights import require_source, take_weights
from m2mkd_jax.stages import module_name


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the teacher modules that config.module names from scratch and saves them under
    "module/stage_K"."""
    training = describe(config, mesh)
    meta = require_source(config, "meta")
    origins = [Origin(meta, f"meta/{name}", f"meta/{name}") for name in training.helpers["meta"]]
    helpers = take_weights(config, training.helpers, origins, frozen=True).params
    return train_phase(training, workdir, mesh, helpers=helpers)


def describe(config: Config, mesh: Mesh) -> Training:
    """The modules of config.module, each in a hybrid whose other stages are the frozen meta
    model's.

    As in the original, stochastic depth ramps over all blocks of a hybrid, meta and module alike.
    """
    check_exchange(config, "meta", "module")
    meta, teacher = meta_network(config), module_network(config, "module")
    stages = config.modules()
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
        return {module_name(stage): Outputs(logits[stage], None, {}) for stage in stages}

    return Training(
        PHASE,
        config,
        init=lambda key: {"module": teacher.init(key, only=stages)},
        rules=family_of_role(config, "module").rules,
        forward=forward,
        helpers=parameter_shapes(config, meta, "meta", mesh, only=others),
    )


PHASE = Phase(
    describe=describe,
    run=run,
    role="module",
    modular=True,
    reads=("module", "meta", "teacher", "distill.pairs_at_once"),
    differentiates=("meta", "teacher"),
    sources=(WeightSource("meta"),),
    folder="modules",
    makes="modules",
    files=(FileKind("module", "a module as phase train_module makes it (MT)", single=True),),
)
