"""Trained networks, ready to be called, from nothing but a workdir."""

from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from common_jax import checkpoint
from common_jax.config import freeze
from m2mkd_jax.config import Config
from m2mkd_jax.data.feed import prepare_evaluation
from m2mkd_jax.models import vit
from m2mkd_jax.models.nac.network import NacNetwork
from m2mkd_jax.phases.families import family, student_modules, whole_student
from m2mkd_jax.phases.networks import (
    meta_network,
    teacher_network,
)
from m2mkd_jax.stages import Network

Apply = Callable[[Any, jax.Array], jax.Array]

# phase: (subtree of its parameters, its network)
NETWORKS: dict[str, tuple[str, Callable[[Config], Network | NacNetwork]]] = {
    "pretrain_meta": ("meta", meta_network),
    "train_module": ("module", teacher_network),
    "assemble": ("teacher", teacher_network),
    "distill": ("student", student_modules),
    "end_to_end": ("student", whole_student),
    "few_shot": ("student", whole_student),
}


def load_model(source: epath.PathLike, *, mesh: Mesh | None = None) -> tuple[Apply, dict[str, Any]]:
    """The network that a run trained.

    Args:
      source: the run's workdir (its newest checkpoint) or one step's folder.
      mesh: devices to put the parameters on, split as in training; None for the first device.

    Returns:
      `apply(params, x)` and `params`. For a whole network x are images (B, I, J, channels) with
      pixels from 0 to 255, and the result is logits (B, labels). For a single module (phases
      train_module and distill) it runs that stage alone, on images if it is the first and else on
      tokens (B, T, D).

    Where the run kept a running average (config.optim.ema), the parameters are that average, as
    they were evaluated.

    Raises:
      FileNotFoundError: when there is no finished checkpoint.
    """
    config = freeze(Config, checkpoint.load_config(source))
    role, build = NETWORKS[config.phase]
    rules = family(config).rules if role == "student" else vit.PARTITION_RULES
    params = checkpoint.load(
        source,
        subtree=role,
        mesh=mesh,
        rules=rules,
        average=config.optim.ema > 0,
    )
    network = build(config)
    if config.phase not in ("train_module", "distill"):
        return lambda params, x: network.apply(params, prepare(x, config))[0], params
    (stage,) = config.modules()

    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = prepare(x, config) if stage == 0 else x
        return network.apply(params, x, start=stage, stop=stage + 1)[0]

    return apply, params


def prepare(images: jax.Array, config: Config) -> jax.Array:
    """Images with pixels from 0 to 255 as the run's networks take them."""
    return prepare_evaluation({"image": images}, config.data)
