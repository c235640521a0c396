"""The config of a mixture-of-experts layer, and the tables that its fields name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Annotated

from common_jax.config import FieldError, Section
from common_jax.mesh import AXES
from common_jax.ranges import NonNegative, key_of, one_of, shown
from m2mkd_jax.moe.pairs import PairsConfig, pair_router
from m2mkd_jax.moe.routers import expert_choice, softmax_topk, topk_softmax
from m2mkd_jax.moe.routing import Router
from m2mkd_jax.moe.soft import SOFT, SoftConfig

# The routers, by their name in `config.model.moe.router`.
ROUTERS: dict[str, Router] = {
    "topk_softmax": pair_router(topk_softmax, ("importance", "gshard", "z"), renormalised=True),
    "softmax_topk": pair_router(softmax_topk, ("importance", "load", "gshard", "z"), noisy=True),
    # Experts that choose are balanced by construction; only the size of their logits can grow.
    "expert_choice": pair_router(expert_choice, ("z",), tokens_choose=False),
    "soft": SOFT,
}

# Bound of the uniform initialisation of expert matrices, from (d_in, d_out). fastmoe applies He
# initialisation to a three-dimensional tensor, which makes its fan-in d_in * d_out; fan_in is the
# initialisation of an ordinary linear layer.
EXPERT_INITS = MappingProxyType(
    {
        "fastmoe": lambda d_in, d_out: 1 / math.sqrt(d_in * d_out),
        "fan_in": lambda d_in, d_out: 1 / math.sqrt(d_in),
    }
)


@dataclass(frozen=True)
class BalanceConfig(Section):
    """Weights of the balance losses in the training loss; a loss of weight 0 is not computed.

    importance, load: weights of the importance and load losses of V-MoE.
    gshard: weight of GShard's balance loss.
    z: weight of ST-MoE's router z-loss.
    """

    importance: NonNegative = 0.0
    load: NonNegative = 0.0
    gshard: NonNegative = 0.0
    z: NonNegative = 0.0

    def active(self) -> dict[str, float]:
        weights = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: weight for name, weight in weights.items() if weight != 0}


@dataclass(frozen=True)
class MoeConfig(PairsConfig, SoftConfig):
    """The config of a mixture-of-experts layer; the defaults are those of m2mKD students (fastmoe).

    experts: number of experts E.
    chosen: number A of experts per token; if experts choose, the mean number.
    router: how experts or tokens are chosen, a key of `ROUTERS`.
    order: which tokens of a group get slots first: "token", by position, or "priority", by
        descending gate probability.
    noise_std: noise on the logits in training, in units of 1 / E; only softmax_topk adds it.
    dispatch: "dropless" serves every pair, "capacity" drops pairs beyond the slots of an expert.
    capacity_factor: slots per expert = capacity_factor * (tokens per group) * A / E, rounded up.
    groups: routing groups per batch, for capacity and expert_choice; a multiple of the number of
        devices. Dropless token choice ignores groups.
    router_bias: whether the gate has a bias (fastmoe: yes, V-MoE: no).
    slots_per_expert: slots per expert and example, for soft; None for about one slot per token over
        all experts.
    expert_init: initialisation of the experts, a key of `EXPERT_INITS`.
    """

    router: Annotated[str, key_of(lambda: ROUTERS)] = "topk_softmax"
    expert_init: Annotated[str, one_of(*EXPERT_INITS)] = "fastmoe"
    balance: BalanceConfig = BalanceConfig()

    def __post_init__(self):
        super().__post_init__()
        router = ROUTERS[self.router]
        self._refuse_fields_of_other_routers()
        router.config.check(self)
        for name, weight in self.balance.active().items():
            if name not in router.balance:
                raise FieldError(
                    f"balance.{name}={weight} must be 0 with router={self.router!r}, which has "
                    f"only {', '.join(router.balance) or 'none'}; set it to 0 or change the router"
                )
        if self.balance.load and not self.noise_std:
            raise FieldError(
                f"balance.load={self.balance.load} must be 0 if noise_std is 0, since the load "
                "loss is a probability under that noise: set balance.load to 0 or raise noise_std"
            )

    @property
    def grouped(self) -> bool:
        """True if the tokens of a group compete, so that results depend on the grouping."""
        return ROUTERS[self.router].grouped(self)

    @property
    def noisy(self) -> bool:
        """True if training adds noise to the gate."""
        return ROUTERS[self.router].noisy(self)

    @property
    def idle(self) -> dict[str, str]:
        """The fields that are set to something else than their default but have no effect, and
        why."""
        reasons = ROUTERS[self.router].idle(self)
        return {
            field.name: reasons[field.name]
            for field in fields(self)
            if field.name in reasons and getattr(self, field.name) != field.default
        }

    @property
    def untrained(self) -> str:
        """Why no gradient reaches the router; "" if one does."""
        return "" if self.balance.active() else ROUTERS[self.router].untrained(self)

    def _refuse_fields_of_other_routers(self) -> None:
        # `MoeConfig` has the fields of all routers, so any of them can be given as a flag.
        own = {field.name for field in fields(ROUTERS[self.router].config)}
        for name, other in ROUTERS.items():
            for field in fields(other.config):
                value = getattr(self, field.name)
                if field.name not in own and value != field.default:
                    raise FieldError(
                        f"{field.name}={shown(value)} must be {field.default!r} with "
                        f"router={self.router!r}, which does not read it: leave it out, or take a "
                        f"router that does, such as {name!r}"
                    )


def _require(holds: bool, key: str, value: object, expected: str, way_out: str) -> None:
    if not holds:
        raise ValueError(f"config.model.moe.{key}={value} must be {expected}; {way_out}")


def check_moe(config: MoeConfig, mesh_shape: Mapping[str, int], batch: int) -> None:
    """Raises ValueError if the layer cannot run for this global batch on this mesh.

    `mesh_shape` maps axis names to sizes; a missing axis has size 1.
    """
    expert_axis = mesh_shape.get("expert", 1)
    devices = math.prod(mesh_shape.get(axis, 1) for axis in AXES)
    _require(
        config.experts % expert_axis == 0,
        "experts",
        config.experts,
        f"a multiple of the mesh's expert axis, {expert_axis}",
        "change config.mesh.expert or config.model.moe.experts",
    )
    if not config.grouped:
        # `route` makes every example a group then, and groups are split over all devices.
        if batch % devices:
            raise ValueError(
                f"a batch of {batch} examples must be a multiple of the mesh's {devices} devices; "
                "change config.mesh or the batch size"
            )
        return
    _require(
        config.groups % devices == 0,
        "groups",
        config.groups,
        f"a multiple of the mesh's {devices} devices",
        "change config.mesh or config.model.moe.groups",
    )
    _require(
        batch % config.groups == 0,
        "groups",
        config.groups,
        f"a divisor of the batch, {batch} examples",
        "change the batch size or config.model.moe.groups",
    )
