"""The networks of a config by role; a role is the key of a network's parameters in a checkpoint."""

import dataclasses
import itertools
import math
import types
from typing import Any

import jax
from jax.sharding import Mesh

from common_jax.config import under
from common_jax.mesh import match_rules, with_shardings
from m2mkd_jax.config import Config
from m2mkd_jax.families import Family, family_of
from m2mkd_jax.families.family import WholeNetwork
from m2mkd_jax.models.bridge import BridgedStage, Layout
from m2mkd_jax.stages import Network

# role -> section of the config. The order matters to `read_teacher`, which prefers later roles.
SECTIONS = types.MappingProxyType(
    {"meta": "meta", "module": "teacher", "teacher": "teacher", "student": "model"}
)


def family_of_role(config: Config, role: str) -> Family:
    """The family of the network whose parameters are under `role`."""
    return family_of(getattr(config, SECTIONS[role]))


def network_streams(config: Config, *, train: bool) -> tuple[str, ...]:
    """The random streams that the networks of a run draw from, in training or in evaluation."""
    # Of all sections, whether or not the phase has these networks: keys are made from names, so an
    # unused stream changes no other.
    families = [family_of(getattr(config, section)) for section in ("meta", "teacher", "model")]
    names = (one.streams if train else one.evaluation_streams for one in families)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(names)))


def whole_network(config: Config, role: str, *, drop_path: float = 0.0) -> WholeNetwork:
    """The whole network whose parameters are under `role`."""
    section = SECTIONS[role]
    with under(f"config.{section}"):
        build = family_of_role(config, role).whole
        return build(getattr(config, section), config.context, drop_path)


def module_network(config: Config, role: str, *, drop_path: float = 0.0) -> Network:
    """The modules, one per stage, of the network whose parameters are under `role`."""
    if role == "module" and config.init.teacher:
        return bridge(config, stitched_modules(config, drop_path=drop_path))
    section = SECTIONS[role]
    with under(f"config.{section}"):
        build = family_of_role(config, role).modules
        return build(getattr(config, section), config.context, drop_path)


def stitched_modules(config: Config, *, drop_path: float = 0.0) -> Network:
    """The modules of config.teacher, with stitches to and from the meta model's width."""
    with under("config.teacher"):
        context = dataclasses.replace(config.context, stitched=True)
        return family_of(config.teacher).modules(config.teacher, context, drop_path)


def bridge(config: Config, network: Network, *, only: tuple[int, ...] | None = None) -> Network:
    """`network` with the modules of config.teacher, all or those in `only`, wrapped to take and
    return tokens in the meta model's layout."""
    own, outer = (token_layout(config, section) for section in (config.teacher, config.meta))
    if own == outer:
        return network
    count = len(network)
    stages = [
        BridgedStage(stage, own, outer, embeds=i == 0, classifies=i == count - 1)
        if only is None or i in only
        else stage
        for i, stage in enumerate(network.stages)
    ]
    return Network(tuple(stages))


def token_layout(config: Config, section: Any) -> Layout:
    """The tokens between two stages of the meta model or a teacher."""
    family = family_of(section)
    patches = family.tokens(section, config.interface) - family.leading_tokens(section)
    return Layout(**family.leading(section), side=math.isqrt(patches))


def check_exchange(config: Config, *roles: str) -> None:
    """Raises ValueError if these networks, whose stages take each other's places, differ in the
    tokens that precede the patches."""
    stated = {}
    for section in (SECTIONS[role] for role in roles):
        own = getattr(config, section)
        stated |= {f"config.{section}": fields} if (fields := family_of(own).leading(own)) else {}
    if any(fields != next(iter(stated.values())) for fields in stated.values()):
        shown = "; ".join(
            f"{section} has {', '.join(f'{name}={x}' for name, x in fields.items())}"
            for section, fields in stated.items()
        )
        raise ValueError(
            f"{shown}: stages that take each other's places need the same tokens before the "
            "patches. Give all of these sections the same values, such as "
            f"{' '.join(f'--{section}.registers=4' for section in stated)}"
        )


def meta_network(config: Config, *, drop_path: float = 0.0) -> Network:
    """The meta model."""
    return whole_network(config, "meta", drop_path=drop_path)


def teacher_network(config: Config, *, drop_path: float = 0.0) -> Network:
    """The teacher, cut into as many stages as the meta model."""
    return whole_network(config, "teacher", drop_path=drop_path)


def whole_student(config: Config, *, drop_path: float = 0.0) -> WholeNetwork:
    """The whole student network."""
    return whole_network(config, "student", drop_path=drop_path)


def student_modules(config: Config, *, drop_path: float = 0.0) -> Network:
    """The student network cut into students, one per stage."""
    return module_network(config, "student", drop_path=drop_path)


def parameter_shapes(
    config: Config,
    network: WholeNetwork | Network,
    role: str,
    mesh: Mesh,
    *,
    only: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Shapes and shardings of a network's parameters, under `role`; for all stages or those in
    `only`."""
    # The `init` of a whole NAC has no `only`.
    init = network.init if only is None else lambda key: network.init(key, only=only)
    params = jax.eval_shape(lambda key: {role: init(key)}, jax.random.key(0))
    return with_shardings(params, match_rules(family_of_role(config, role).rules, params, mesh))
