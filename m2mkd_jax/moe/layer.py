"""The mixture-of-experts layer that stands in an MLP's place in a V-MoE block.

Routing says who goes where, dispatching moves the tokens; this module holds the parameters, the
choices (`MoeConfig`) and the bookkeeping. Collections it writes, where the caller makes them
mutable: `moe` (load, dropped, entropy, balance_loss) and `routing` (expert, weight, logits).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.config import FieldError, Section
from common_jax.mesh import AXES
from common_jax.ranges import NonNegative, Positive, Size, one_of
from m2mkd_jax.moe import routers
from m2mkd_jax.moe.dispatch import DISPATCHERS
from m2mkd_jax.moe.grouped import Experts

# Bound of the uniform initial expert matrices, from (d_in, d_out). fastmoe applies the He rule to a
# three-dimensional tensor, whose fan-in comes out as d_in * d_out; fan_in is a linear layer's rule.
EXPERT_INITS = {
    "fastmoe": lambda d_in, d_out: 1 / math.sqrt(d_in * d_out),
    "fan_in": lambda d_in, d_out: 1 / math.sqrt(d_in),
}

# The balance losses that have a meaning for each router.
BALANCE_OF = {
    "topk_softmax": ("importance", "gshard", "z"),
    "softmax_topk": ("importance", "load", "gshard", "z"),
    "expert_choice": ("z",),
}


@dataclass(frozen=True)
class BalanceConfig(Section):
    """Weights of the balance losses in the training loss; at 0 a loss is not computed."""

    importance: NonNegative = 0.0
    load: NonNegative = 0.0
    gshard: NonNegative = 0.0
    z: NonNegative = 0.0

    def active(self) -> dict[str, float]:
        weights = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: weight for name, weight in weights.items() if weight != 0}


@dataclass(frozen=True)
class MoeConfig(Section):
    """What a mixture-of-experts layer is; the defaults are the m2mKD students' (fastmoe).

    experts, chosen: E and A. Where experts choose, `chosen` is the mean number a token.
    router, order, noise_std: see `routing`; the noise is drawn in training by softmax_topk.
    dispatch: see `dispatch`.
    capacity_factor: slots of an expert = capacity_factor * (tokens of a group) * A / E, rounded up.
    groups: routing groups of a batch, for capacity and expert_choice; a whole number of groups a
        device. Token choice without drops has no use for groups.
    router_bias: whether the gate has a bias (fastmoe: yes, V-MoE: no).
    expert_init: see `EXPERT_INITS`.

    Raises FieldError for a value out of range or unknown.
    """

    experts: Size = 8
    chosen: Size = 2
    router: Annotated[str, one_of(*routers.ROUTERS)] = "topk_softmax"
    order: Annotated[str, one_of(*routers.ORDERS)] = "token"
    noise_std: NonNegative = 1.0
    dispatch: Annotated[str, one_of(*DISPATCHERS)] = "dropless"
    capacity_factor: Positive = 1.25
    groups: Size = 1
    router_bias: bool = True
    expert_init: Annotated[str, one_of(*EXPERT_INITS)] = "fastmoe"
    balance: BalanceConfig = BalanceConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.chosen > self.experts:
            raise FieldError(
                f"chosen={self.chosen} must be from 1 to experts={self.experts}; change either"
            )
        known = BALANCE_OF[self.router]
        for name, weight in self.balance.active().items():
            if name not in known:
                raise FieldError(
                    f"balance.{name}={weight} must be 0 with router={self.router!r}, which has "
                    f"only {', '.join(known)}; set it to 0 or change the router"
                )
        if self.balance.load and not self.noise_std:
            raise FieldError(
                f"balance.load={self.balance.load} must be 0 where noise_std is 0, since the load "
                "loss is a probability under that noise: set one to 0 or raise the other"
            )

    @property
    def grouped(self) -> bool:
        """Whether the tokens of a group compete, so that it matters what a group is."""
        return self.dispatch == "capacity" or self.router not in routers.TOKEN_CHOICE

    @property
    def noisy(self) -> bool:
        """Whether training draws noise for the gate."""
        return self.router == "softmax_topk" and self.noise_std > 0

    def slots(self, tokens: int) -> int:
        """Slots of an expert in a group of so many tokens: C."""
        return min(tokens, math.ceil(self.capacity_factor * tokens * self.chosen / self.experts))


def _require(holds: bool, key: str, value: object, expected: str, way_out: str) -> None:
    if not holds:
        raise ValueError(f"config.model.moe.{key}={value} must be {expected}; {way_out}")


def check_moe(config: MoeConfig, mesh_shape: Mapping[str, int], batch: int) -> None:
    """Raises ValueError if the layer cannot run for this batch on this mesh; nothing is compiled.

    mesh_shape: sizes by axis name; an axis that is not named has size 1.
    batch: examples in the global batch.
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


class MoeMlp(nn.Module):
    """Mixture of expert MLPs, D -> hidden -> D, exact gelu (V-MoE; fastmoe's FMoETransformerMLP).

    Rng stream `gate`: the router's noise, in training with softmax_topk. Collection `moe` gets
    load `[E]` (share of the pairs, before drops), dropped (share of the pairs), entropy (nats) and
    balance_loss (weighted, to be added to the training loss; the load loss only where noise was
    drawn). Collection `routing` gets expert, weight `[B,T,A]` and logits `[B,T,E]` (with the noise)
    where tokens choose.

    At initialisation nothing is computed, so that a batch of one will do on any mesh.
    """

    config: MoeConfig
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool = False) -> Float[Array, "B T D"]:
        config = self.config
        batch, length, width = x.shape
        gate_dtype = jnp.promote_types(x.dtype, jnp.float32)
        router = nn.Dense(
            config.experts,
            use_bias=config.router_bias,
            dtype=gate_dtype,
            # A TPU would multiply float32 in bfloat16 otherwise.
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=nn.initializers.normal(0.02),
            name="router",
        )
        experts = self._experts(width)
        clean = router(x.astype(gate_dtype))
        if self.is_initializing():
            return x.astype(self.dtype)

        check_moe(config, dict(jax.sharding.get_abstract_mesh().shape), batch)
        groups = config.groups if config.grouped else batch
        clean = clean.reshape(groups, -1, config.experts)
        noise = train and config.noisy
        logits = routers.noisy(clean, self.make_rng("gate"), config.noise_std) if noise else clean
        slots = config.slots(clean.shape[1])
        routes = routers.ROUTERS[config.router](
            logits, chosen=config.chosen, slots=slots, order=config.order
        )
        y, dropped = DISPATCHERS[config.dispatch](
            x.astype(self.dtype).reshape(groups, -1, width), routes, experts, slots
        )

        if self.is_mutable_collection("moe"):
            self._put("moe", "load", routers.load(routes, config.experts))
            self._put("moe", "dropped", dropped)
            self._put("moe", "entropy", routers.entropy(clean))
            self._put("moe", "balance_loss", self._balance_loss(clean, logits, noise=noise))
        if self.is_mutable_collection("routing") and config.router in routers.TOKEN_CHOICE:
            expert, weight = routers.by_token(routes, config.chosen)
            self._put("routing", "expert", expert.reshape(batch, length, -1))
            self._put("routing", "weight", weight.reshape(batch, length, -1))
            self._put("routing", "logits", logits.reshape(batch, length, -1))
        return y.reshape(x.shape)

    def _experts(self, width: int) -> Experts:
        count, bound = self.config.experts, EXPERT_INITS[self.config.expert_init]

        def matrices(name: str, d_in: int, d_out: int) -> Array:
            limit = bound(d_in, d_out)

            def init(key: Array, shape: tuple[int, ...]) -> Array:
                return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

            return jnp.asarray(self.param(name, init, (count, d_in, d_out)), self.dtype)

        def biases(name: str, d_out: int) -> Array:
            return jnp.asarray(self.param(name, nn.initializers.zeros, (count, d_out)), self.dtype)

        return Experts(
            up=matrices("up", width, self.hidden),
            up_bias=biases("up_bias", self.hidden),
            down=matrices("down", self.hidden, width),
            down_bias=biases("down_bias", width),
        )

    def _balance_loss(
        self, clean: Float[Array, "G N E"], logits: Float[Array, "G N E"], *, noise: bool
    ) -> Float[Array, ""]:
        config = self.config
        losses = {
            "importance": lambda: routers.importance_loss(clean),
            "load": lambda: routers.load_loss(
                clean, logits, chosen=config.chosen, std=config.noise_std
            ),
            "gshard": lambda: routers.gshard_loss(logits),
            "z": lambda: routers.z_loss(clean),
        }
        wanted = {n: w for n, w in config.balance.active().items() if noise or n != "load"}
        terms = [weight * losses[name]() for name, weight in wanted.items()]
        return sum(terms, jnp.zeros((), clean.dtype))

    def _put(self, collection: str, name: str, value: Array) -> None:
        self.sow(collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
