"""Phase train_module (MT): trains teacher modules, each at its own stage of the frozen meta model,
or joins the modules of a trained network to it."""

import functools
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Allowance, Origin, Planned, WarmStart
from m2mkd_jax.config import Config
from m2mkd_jax.hybrid import module_logits, replace_stage, shared_tokens
from m2mkd_jax.phases.networks import (
    bridge,
    check_exchange,
    family_of_role,
    meta_network,
    module_network,
    parameter_shapes,
    stitched_modules,
)
from m2mkd_jax.phases.objective import Outputs
from m2mkd_jax.phases.phase import FileKind, Phase, Splits, Training, WeightSource, config_feed
from m2mkd_jax.phases.sources.teachers import check_classes, read_teacher
from m2mkd_jax.phases.sources.weights import (
    compare_images,
    refuse_fresh,
    require_source,
    take_weights,
)
from m2mkd_jax.phases.training import train_phase
from m2mkd_jax.stages import module_name, stage_name


def run(
    config: Config, workdir: epath.Path, mesh: Mesh, splits: Splits | None = None
) -> dict[str, Any]:
    """Trains the teacher modules that config.module names and saves them under "module/stage_K".

    They start from scratch, or from the network in config.init.teacher; in that case only the head
    and their stitches to the meta model are trained.
    """
    training = describe(config, mesh)
    helpers = _take_meta(training).params
    feed = config_feed(training, workdir, splits)
    check_classes(config, feed.label_names, ("meta",))
    start = functools.partial(_join, config) if config.init.teacher else None
    return train_phase(training, workdir, mesh, helpers=helpers, warm_start=start, feed=feed)


def describe(config: Config, mesh: Mesh) -> Training:
    """The modules of config.module, each in a hybrid whose other stages are those of the frozen
    meta model.

    As in the original, stochastic depth ramps over all blocks of a hybrid, meta and module alike.
    """
    family, joins = family_of_role(config, "module"), bool(config.init.teacher)
    if not joins:
        check_exchange(config, "meta", "module")
    meta = meta_network(config)
    teacher = stitched_modules(config) if joins else module_network(config, "module")
    stages = config.modules()
    hybrids = {
        stage: family.ramp(replace_stage(meta, stage, teacher), config.drop_path)
        for stage in stages
    }
    if joins:
        # After `ramp`, which needs the blocks of unwrapped stages. Only the module is wrapped: the
        # other stages are the meta model's own.
        hybrids = {stage: bridge(config, one, only=(stage,)) for stage, one in hybrids.items()}
    # With a single module, the meta stage that it replaces never runs; with several, all stages do.
    others = tuple(i for i in range(len(meta)) if stages != (i,))

    def forward(params, helpers, images, train, rngs):
        # The frozen stages are in training mode as well, and drop paths, as in the original. No
        # gradient enters those before the module; it passes through those after it.
        hidden = shared_tokens(hybrids, helpers["meta"], images, train=train, rngs=rngs)
        logits, _ = module_logits(
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
        # From random weights, as in the original, not from the meta stage that a module replaces.
        init=lambda key: {"module": teacher.init(key, only=stages)},
        rules=family.rules,
        forward=forward,
        trainable=_trained(config) if joins else ".*",
        helpers=parameter_shapes(config, meta, "meta", mesh, only=others),
    )


def _trained(config: Config) -> str:
    """A regex of what is trained of the modules of config.init.teacher."""
    family = family_of_role(config, "module")
    return f"{family.stitches}|{family.head(config.teacher)}"


def _take_meta(training: Training, *, planned: Planned | None = None) -> WarmStart:
    """Loads the stages of the meta model; with `planned`, only checks that they fit."""
    config, shapes = training.config, training.helpers
    meta = require_source(config, "meta")
    origins = [Origin(meta, f"meta/{name}", f"meta/{name}") for name in shapes["meta"]]
    return take_weights(config, shapes, origins, frozen=True, planned=planned)


def _fit(training: Training, planned: Planned) -> None:
    _take_meta(training, planned=planned)
    if training.config.init.teacher:
        _join(training.config, training.shapes, planned=planned)


def _join(
    config: Config, shapes: Mapping[str, Any], *, planned: Planned | None = None
) -> WarmStart:
    """Loads the modules from config.init.teacher; raises ValueError if config.teacher describes a
    different network."""
    refuse_fresh(config, shapes, trained=_trained(config))
    found = read_teacher(config, "config.init.teacher", config.init.teacher)
    # Only for its error, if the run holds single modules.
    found.whole()
    found.require_section(config)
    compare_images(config, found.source, frozen=True)  # frozen except for stitches and head
    stitches = Allowance(family_of_role(config, "module").stitches, "stitches are trained")
    origins = [
        Origin(found.source, f"{found.role}/{name}", f"module/{name}")
        for name in map(stage_name, config.modules())
    ]
    # The average, since all but the head stays as it is, and the head fits it.
    return take_weights(config, shapes, origins, fresh=(stitches,), average=True, planned=planned)


PHASE = Phase(
    describe=describe,
    run=run,
    role="module",
    modular=True,
    reads=("module", "meta", "teacher", "distill.pairs_at_once"),
    differentiates=("meta", "teacher"),
    sources=(WeightSource("meta"), WeightSource("teacher", section="init")),
    fit=_fit,
    folder="modules",
    makes="modules",
    files=(FileKind("module", "a module trained by phase train_module (MT)", single=True),),
)
