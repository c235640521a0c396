"""Phase pretrain_meta (PT): trains the meta model with labels from scratch."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from m2mkd_jax.config import Config
from m2mkd_jax.phases.phase import Phase, Training
from m2mkd_jax.phases.training import train_phase, whole_training


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the meta model and saves its parameters under "meta"."""
    return train_phase(describe(config, mesh), workdir, mesh)


def describe(config: Config, mesh: Mesh) -> Training:
    """The meta model, on any mesh."""
    return whole_training(PHASE, config)


PHASE = Phase(
    describe=describe,
    run=run,
    role="meta",
    reads=("meta",),
    differentiates=("meta",),
    ood=True,
    folder="meta",
    makes="meta",
    replaceable=True,
)
