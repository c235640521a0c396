"""Phase assemble (FT): assembles the trained modules into the teacher and fine-tunes it."""

from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Origin, Planned, WarmStart
from m2mkd_jax.config import Config
from m2mkd_jax.phases.phase import FileKind, Phase, Splits, Training, WeightSource, config_feed
from m2mkd_jax.phases.sources.weights import require_stage_sources, take_weights
from m2mkd_jax.phases.training import train_phase, whole_training
from m2mkd_jax.stages import stage_name


def run(
    config: Config, workdir: epath.Path, mesh: Mesh, splits: Splits | None = None
) -> dict[str, Any]:
    """Trains the assembled teacher and saves its parameters under "teacher"."""
    require_stage_sources(config, "modules", len(config.teacher.depths))
    training = whole_training(PHASE, config)
    return train_phase(
        training,
        workdir,
        mesh,
        feed=config_feed(training, workdir, splits),
        warm_start=lambda shapes: _assemble(config, shapes),
    )


def _assemble(
    config: Config, shapes: Mapping[str, Any], *, planned: Planned | None = None
) -> WarmStart:
    """Loads each stage from its module; with `planned`, only checks that all fit."""
    sources = require_stage_sources(config, "modules", len(config.teacher.depths))
    origins = [
        Origin(source, f"module/{stage_name(i)}", f"teacher/{stage_name(i)}")
        for i, source in enumerate(sources)
    ]
    # Every parameter must come from a module. The original loads them without such a check.
    return take_weights(config, shapes, origins, planned=planned)


def _fit(training: Training, planned: Planned) -> None:
    _assemble(training.config, training.shapes, planned=planned)


PHASE = Phase(
    describe=lambda config, mesh: whole_training(PHASE, config),
    run=run,
    role="teacher",
    reads=("teacher",),
    differentiates=("teacher",),
    sources=(WeightSource("modules"),),
    fit=_fit,
    ood=True,
    folder="teacher",
    makes="teacher",
    replaceable=True,
    files=(
        FileKind("teacher", "a whole {network} or DeiT, timm's too, as teacher (FT)"),
        FileKind(
            "teacher_module",
            "a module cut from a teacher, or a folder with all of them",
            single=True,
            cut=True,
        ),
    ),
)
