"""The ViTs of a config, and where their weights come from."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from common_jax.mesh import Rules, match_rules
from common_jax.weights import Allowance, Origin, WarmStart, take
from m2mkd_jax.config import Config
from m2mkd_jax.models import vit
from m2mkd_jax.models.positions import resize_positions
from m2mkd_jax.stages import Network

ADAPT = {r".*/pos_embed": lambda table, shape: resize_positions(table, shape[1])}


def meta_network(config: Config, *, drop_path: float = 0.0) -> Network:
    """The shared meta model."""
    return vit.build(config.meta, config.interface, dtype=config.dtype, drop_path=drop_path)


def teacher_network(config: Config, *, drop_path: float = 0.0) -> Network:
    """The teacher, cut into as many stages."""
    return vit.build(config.teacher, config.interface, dtype=config.dtype, drop_path=drop_path)


def wanted(
    network: Network, role: str, mesh: Mesh, rules: Rules, *, only: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Shapes and shardings of a network's parameters under `role`, of all stages or those in
    `only`."""
    params = jax.eval_shape(lambda key: {role: network.init(key, only=only)}, jax.random.key(0))
    shardings = match_rules(rules, params, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings,
    )


def take_weights(
    config: Config,
    wanted: Mapping[str, Any],
    origins: list[Origin],
    *,
    leave: tuple[Allowance, ...] = (),
    fresh: tuple[Allowance, ...] = (),
) -> WarmStart:
    """`common_jax.weights.take` with what the config allows for and position tables resized."""
    sources = config.sources
    if sources.leave:
        leave = (*leave, Allowance(sources.leave, "config.sources.leave"))
    if sources.fresh:
        fresh = (*fresh, Allowance(sources.fresh, "config.sources.fresh"))
    return take(wanted, origins, leave=leave, fresh=fresh, adapt=ADAPT)


def require_source(config: Config, name: str) -> str:
    """config.sources.NAME; raises ValueError where it is empty."""
    source = getattr(config.sources, name)
    if not source:
        raise ValueError(
            f"config.sources.{name} is empty; phase={config.phase!r} needs the workdir of a run "
            "that made it"
        )
    return source


def require_stage_sources(config: Config, name: str, count: int) -> tuple[str, ...]:
    """config.sources.NAME with one workdir a stage; raises ValueError for another number."""
    sources = getattr(config.sources, name)
    if len(sources) != count:
        raise ValueError(
            f"config.sources.{name} names {len(sources)} workdirs {sources} and "
            f"phase={config.phase!r} needs "
            f"{count}, one a stage in order"
        )
    return sources
