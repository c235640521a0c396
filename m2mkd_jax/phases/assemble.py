"""Phase assemble (FT): assembles the trained modules into the teacher and fine-tunes it."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Origin
from m2mkd_jax.config import Config
from m2mkd_jax.phases.phase import FileKind, Phase, WeightSource
from m2mkd_jax.phases.sources.weights import require_stage_sources, take_weights
from m2mkd_jax.phases.training import train_phase, whole_training
from m2mkd_jax.stages import stage_name


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the assembled teacher and saves its parameters under "teacher"."""
    sources = require_stage_sources(config, "modules", len(config.teacher.depths))
    origins = [
        Origin(source, f"module/{stage_name(i)}", f"teacher/{stage_name(i)}")
        for i, source in enumerate(sources)
    ]
    return train_phase(
        whole_training(PHASE, config),
        workdir,
        mesh,
        # Every parameter must come from a module. The original loads them without such a check.
        warm_start=lambda shapes: take_weights(config, shapes, origins),
    )


PHASE = Phase(
    describe=lambda config, mesh: whole_training(PHASE, config),
    run=run,
    role="teacher",
    reads=("teacher",),
    differentiates=("teacher",),
    sources=(WeightSource("modules"),),
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
