"""Trained networks, ready to be called, from nothing but a workdir."""

from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from common_jax import checkpoint
from common_jax.workdir import freeze_stored
from m2mkd_jax.config import Config
from m2mkd_jax.data.feed import prepare_evaluation
from m2mkd_jax.models import vit
from m2mkd_jax.models.nac.network import NacNetwork
from m2mkd_jax.phases.families import family, student_modules, whole_student
from m2mkd_jax.phases.networks import (
    meta_network,
    teacher_network,
)
from m2mkd_jax.stages import Network, stage_name

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


def load_model(
    source: epath.PathLike, *, module: int | None = None, mesh: Mesh | None = None
) -> tuple[Apply, dict[str, Any]]:
    """The network that a run trained.

    Args:
      source: the run's workdir (its newest checkpoint) or one step's folder.
      module: which one, by its stage, of a run that trained several.
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
      ValueError: when the run trained several modules and `module` is none of them, or no
        checkpoint in the workdir is its run's.
    """
    source = checkpoint.find_step(source)
    config = freeze_stored(Config, checkpoint.load_config(source), source)
    role, build = NETWORKS[config.phase]
    stage = _stage(config, module)
    name = "" if stage is None else stage_name(stage)
    params = checkpoint.load(
        source,
        subtree=f"{role}/{name}" if name else role,
        mesh=mesh,
        rules=family(config).rules if role == "student" else vit.PARTITION_RULES,
        average=config.optim.ema > 0,
    )
    network = build(config)
    if stage is None:
        return lambda params, x: network.apply(params, prepare(x, config))[0], params

    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = prepare(x, config) if stage == 0 else x
        return network.apply(params, x, start=stage, stop=stage + 1)[0]

    return apply, {name: params}


def _stage(config: Config, module: int | None) -> int | None:
    """The stage of the module to load, None for a whole network; raises as `load_model`."""
    modular = config.phase in ("train_module", "distill")
    stages = config.modules() if modular else ()
    if module is None and len(stages) < 2:
        return stages[0] if modular else None
    if module not in stages:
        way_out = f"give one of its modules, {list(stages)}" if modular else "leave it out"
        raise ValueError(
            f"module={module} does not say what to load of a run of phase={config.phase!r}: "
            f"{way_out}"
        )
    return module


def prepare(images: jax.Array, config: Config) -> jax.Array:
    """Images with pixels from 0 to 255 as the run's networks take them."""
    return prepare_evaluation({"image": images}, config.data)
