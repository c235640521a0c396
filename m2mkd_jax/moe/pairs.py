"""Routers that choose (token, expert) pairs: their fields, gate and routing.

The routing functions are in routers.py; dispatch.py moves the tokens.

Axes: B examples, T tokens, G routing groups, N tokens per group, E experts, A experts per token.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from common_jax.config import FieldError
from common_jax.nn.mlp import INIT
from common_jax.ranges import NonNegative, Positive, Size, one_of
from m2mkd_jax.moe import routers
from m2mkd_jax.moe.dispatch import DISPATCHERS
from m2mkd_jax.moe.grouped import Experts
from m2mkd_jax.moe.routing import Router, RouterConfig


@dataclass(frozen=True)
class PairsConfig(RouterConfig):
    """The fields of `config.model.moe` that routers of pairs read; see `MoeConfig`."""

    chosen: Size = 2
    order: Annotated[str, one_of(*routers.ORDERS)] = "token"
    noise_std: NonNegative = 1.0
    dispatch: Annotated[str, one_of(*DISPATCHERS)] = "dropless"
    capacity_factor: Positive = 1.25
    groups: Size = 1
    router_bias: bool = True

    def check(self) -> None:
        if self.chosen > self.experts:
            raise FieldError(
                f"chosen={self.chosen} must be from 1 to experts={self.experts}; change either"
            )

    def slots(self, tokens: int) -> int:
        """C: slots per expert in a group of `tokens` tokens."""
        # An expert gets a token at most once, so slots beyond the number of tokens would stay
        # empty.
        return min(tokens, math.ceil(self.capacity_factor * tokens * self.chosen / self.experts))


@dataclass(frozen=True)
class PairRouting:
    """The pairs of a batch, and the logits that they were chosen by.

    Attributes:
      config: the router's fields.
      routes: the pairs.
      clean: logits without noise.
      logits: logits with any noise, by which the pairs were chosen.
      noise: whether there is noise.
      tokens_choose: whether every token chooses the same number of experts.
      batch: B and T.
    """

    config: PairsConfig
    routes: routers.Routes
    clean: Float[Array, "G N E"]
    logits: Float[Array, "G N E"]
    noise: bool
    tokens_choose: bool
    batch: tuple[int, ...]

    def mix(
        self, x: Float[Array, "B T D"], experts: Experts
    ) -> tuple[Float[Array, "B T D"], Mapping[str, Array]]:
        """y_n = sum over the pairs of token n of weight * expert(x_n), by the config's dispatcher;
        the metrics are load `[E]`, dropped and entropy."""
        groups, tokens, count = self.logits.shape
        y, dropped = DISPATCHERS[self.config.dispatch].run(
            x.reshape(groups, tokens, -1), self.routes, experts, self.config.slots(tokens)
        )
        metrics = {
            "load": routers.load(self.routes, count),
            "dropped": dropped,
            "entropy": routers.entropy(self.clean),
        }
        return y.reshape(x.shape), metrics

    def losses(self) -> Mapping[str, Callable[[], Float[Array, ""]]]:
        """The four losses of routers.py; load is 0 without noise, under which it is a
        probability."""
        config, clean, logits = self.config, self.clean, self.logits
        load = partial(routers.load_loss, clean, logits, chosen=config.chosen, std=config.noise_std)
        if not self.noise:  # in evaluation
            load = partial(jnp.zeros, (), clean.dtype)
        return {
            "importance": partial(routers.importance_loss, clean),
            "load": load,
            "gshard": partial(routers.gshard_loss, logits),
            "z": partial(routers.z_loss, clean),
        }

    def choices(self) -> Mapping[str, Array]:
        """expert and weight `[B, T, A]`, logits `[B, T, E]`; nothing if experts choose."""
        if not self.tokens_choose:
            return {}
        expert, weight = routers.by_token(self.routes, self.config.chosen)
        choices = {"expert": expert, "weight": weight, "logits": self.logits}
        return {name: value.reshape(*self.batch, -1) for name, value in choices.items()}


def linear_gate(config: PairsConfig, name: str) -> nn.Module:
    """logits = x kernel + bias, in the dtype of x."""
    return nn.Dense(
        config.experts,
        use_bias=config.router_bias,
        # By default a TPU multiplies float32 in bfloat16.
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=INIT,
        name=name,
    )


Choose = Callable[..., routers.Routes]


def pair_router(
    choose: Choose,
    balance: tuple[str, ...],
    *,
    noisy: bool = False,
    tokens_choose: bool = True,
    renormalised: bool = False,
) -> Router:
    """The entry of ROUTERS for a routing function of routers.py.

    Args:
      choose: (logits, chosen=A, slots=C, order=name in ORDERS) -> Routes.
      balance: the balance losses that apply to it.
      noisy: whether training adds noise of `noise_std` to the logits.
      tokens_choose: whether tokens choose experts; otherwise experts choose tokens.
      renormalised: whether the weights of a token's experts are a softmax over these alone.
    """

    def grouped(config: PairsConfig) -> bool:
        # If experts choose, tokens compete under any dispatcher: which ones an expert takes depends
        # on all of the group.
        return not tokens_choose or DISPATCHERS[config.dispatch].grouped

    def idle(config: PairsConfig) -> Mapping[str, str]:
        found = {} if noisy else {"noise_std": "this router adds no noise"}
        if not grouped(config):
            served = f"with dispatch={config.dispatch!r} every pair is served"
            found |= dict.fromkeys(("capacity_factor", "groups", "order"), served)
        elif not tokens_choose:
            found["order"] = "experts choose, so tokens are in no order"
        return found

    def untrained(config: PairsConfig) -> str:
        if not renormalised or config.chosen > 1:
            return ""
        return (
            f"chosen=1 leaves the router untrained: {choose.__name__} normalises over the chosen "
            "experts, so the weight of a single one is always 1. config.model.moe.router="
            "softmax_topk trains it, and so does a balance loss"
        )

    def route(
        config: PairsConfig, logits: Float[Array, "B T E"], key: PRNGKeyArray | None
    ) -> PairRouting:
        # Without competition for slots the grouping does not matter: one group per example.
        groups = config.groups if grouped(config) else logits.shape[0]
        # Groups are consecutive examples, so none is split between devices.
        clean = logits.reshape(groups, -1, config.experts)
        noised = clean if key is None else routers.noisy(clean, key, config.noise_std)
        slots = config.slots(clean.shape[1])
        routes = choose(noised, chosen=config.chosen, slots=slots, order=config.order)
        batch = logits.shape[:2]
        return PairRouting(config, routes, clean, noised, key is not None, tokens_choose, batch)

    return Router(
        config=PairsConfig,
        gate=linear_gate,
        route=route,
        balance=balance,
        noisy=lambda config: noisy and config.noise_std > 0,
        grouped=grouped,
        idle=idle,
        untrained=untrained,
    )
