"""Phase pretrain_meta (PT): trains the meta model on labels from scratch."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from m2mkd_jax.config import Config
from m2mkd_jax.phases.phase import FileKind, Phase, Splits, config_feed
from m2mkd_jax.phases.training import train_phase, whole_training


def run(
    config: Config, workdir: epath.Path, mesh: Mesh, splits: Splits | None = None
) -> dict[str, Any]:
    """Trains the meta model and saves its parameters under "meta"."""
    training = whole_training(PHASE, config)
    return train_phase(training, workdir, mesh, feed=config_feed(training, workdir, splits))


PHASE = Phase(
    describe=lambda config, mesh: whole_training(PHASE, config),
    run=run,
    role="meta",
    reads=("meta",),
    differentiates=("meta",),
    ood=True,
    folder="meta",
    makes="meta",
    replaceable=True,
    files=(FileKind("meta", "a whole {network} as meta model (PT)", shallow=True),),
)
