"""The door for routers: what a router says of itself, and what it does for a layer.

`ROUTERS` in config.py has a `Router` for each value of `config.model.moe.router`, and no other file
asks for the name. A new router brings the fields that it reads, a gate, and a `Routing`.

Axes: B examples, T tokens, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from common_jax.config import Section
from common_jax.ranges import Size
from m2mkd_jax.moe.grouped import Experts


@dataclass(frozen=True)
class RouterConfig(Section):
    """The field of `config.model.moe` that every router reads; a subclass has those that it reads
    besides, and `MoeConfig` has them all.

    experts: E.
    """

    experts: Size = 8

    def check(self) -> None:
        """Raises FieldError for fields that do not fit each other; for the chosen router alone."""


@runtime_checkable
class Routing(Protocol):
    """How the tokens of one batch go through the experts."""

    def mix(
        self, x: Float[Array, "B T D"], experts: Experts
    ) -> tuple[Float[Array, "B T D"], Mapping[str, Array]]:
        """Dispatches x to the experts and combines their answers; also returns the metrics that
        become `moe/STAGE/BLOCK/NAME`.

        It is one method because dropless routing adds each block of answers to its tokens at once:
        between two methods it would have to lay out all rows in memory. A router with slots says
        dispatch and combine apart, as `dispatch.Slots`.
        """
        ...

    def losses(self) -> Mapping[str, Callable[[], Float[Array, ""]]]:
        """Balance losses by their field in `config.model.moe.balance`, without weights; computed
        when called."""
        ...

    def choices(self) -> Mapping[str, Array]:
        """The router's decisions, `[B, T, ...]` by name, for the collection `routing`."""
        ...


def never(config: RouterConfig) -> bool:
    """False for any config: for routers that draw no noise, or whose tokens do not compete."""
    del config
    return False


@dataclass(frozen=True)
class Router:
    """An entry of `ROUTERS`.

    Attributes:
      config: the fields that it reads. What only other routers read must keep its default.
      gate: from the config and a name to a module of that name, which takes tokens `[B, T, D]` in
        float32 at least and gives logits. Its parameters are whole on every device.
      route: from the config, these logits and a key to a `Routing`; without a key no noise is
        drawn.
      balance: the balance losses that mean something for it.
      noisy: whether training draws a key for it from the stream `gate`.
      grouped: whether the tokens of a group compete, so that results depend on what a group is.
    """

    config: type[RouterConfig]
    gate: Callable[[Any, str], nn.Module]
    route: Callable[[Any, Array, PRNGKeyArray | None], Routing]
    balance: tuple[str, ...] = ()
    noisy: Callable[[Any], bool] = never
    grouped: Callable[[Any], bool] = never
