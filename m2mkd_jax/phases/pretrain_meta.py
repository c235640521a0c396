"""Phase pretrain_meta (PT): the meta model, one block a stage, trained with labels from scratch."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from m2mkd_jax.config import Config
from m2mkd_jax.models import vit
from m2mkd_jax.phases.networks import meta_network
from m2mkd_jax.phases.objective import whole_forward
from m2mkd_jax.phases.training import Training, train_phase


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the meta model; its parameters are saved under "meta"."""
    return train_phase(describe(config, mesh), workdir, mesh)


def describe(config: Config, mesh: Mesh) -> Training:
    """The meta model, on any mesh."""
    network = meta_network(config, drop_path=config.drop_path)
    return Training(
        config,
        title=config.phase,
        init=lambda key: {"meta": network.init(key)},
        rules=vit.PARTITION_RULES,
        forward=whole_forward(network, "meta"),
    )
