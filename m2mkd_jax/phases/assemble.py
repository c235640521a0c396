"""Phase assemble (FT): the trained modules put together into the teacher, and trained as one."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Origin
from m2mkd_jax.config import Config
from m2mkd_jax.models import vit
from m2mkd_jax.phases.networks import require_stage_sources, take_weights, teacher_network
from m2mkd_jax.phases.objective import whole_forward
from m2mkd_jax.phases.training import Training, train_phase
from m2mkd_jax.stages import stage_name


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the assembled teacher; its parameters are saved under "teacher", one subtree a
    stage."""
    sources = require_stage_sources(config, "modules", len(config.teacher.depths))
    origins = [
        Origin(source, f"module/{stage_name(i)}", f"teacher/{stage_name(i)}")
        for i, source in enumerate(sources)
    ]
    return train_phase(
        describe(config, mesh),
        workdir,
        mesh,
        warm_start=lambda wanted: take_weights(config, wanted, origins),
    )


def describe(config: Config, mesh: Mesh) -> Training:
    """The whole teacher, on any mesh."""
    network = teacher_network(config, drop_path=config.drop_path)
    return Training(
        config,
        title=config.phase,
        init=lambda key: {"teacher": network.init(key)},
        rules=vit.PARTITION_RULES,
        forward=whole_forward(network, "teacher"),
    )
