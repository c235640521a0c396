"""The interface of routers.

`ROUTERS` in config.py has a `Router` for each value of `config.model.moe.router`; no other code
depends on the names. A new router defines the fields that it reads, a gate, and a `Routing`.

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
    """The field of `config.model.moe` that every router reads; subclasses add their own, and
    `MoeConfig` inherits them all.

    experts: E.
    """

    experts: Size = 8

    def check(self) -> None:
        """Raises FieldError if fields conflict; called for the selected router only."""


@runtime_checkable
class Routing(Protocol):
    """The routing of one batch of tokens through the experts."""

    def mix(
        self, x: Float[Array, "B T D"], experts: Experts
    ) -> tuple[Float[Array, "B T D"], Mapping[str, Array]]:
        """Dispatches x to the experts and combines their outputs; also returns the metrics that
        become `moe/STAGE/BLOCK/NAME`.

        This is a single method because dropless routing adds each block of outputs to its tokens
        right away: two methods would need all rows in memory. For routers with slots, dispatch and
        combine are separate, see `dispatch.Slots`.
        """
        ...

    def losses(self) -> Mapping[str, Callable[[], Float[Array, ""]]]:
        """Unweighted balance losses by their field in `config.model.moe.balance`, all that the
        router's `balance` lists; each is computed when called."""
        ...

    def choices(self) -> Mapping[str, Array]:
        """The router's decisions, `[B, T, ...]`, by their name in the collection `routing`."""
        ...


@dataclass(frozen=True)
class Router:
    """An entry of `ROUTERS`.

    Attributes:
      config: the fields that it reads; fields of other routers must keep their defaults.
      gate: (config, name) -> module that maps tokens `[B, T, D]`, at least in float32, to logits.
        Its parameters are replicated.
      route: (config, logits, key) -> `Routing`; there is no noise if the key is None.
      balance: the balance losses that apply to it.
      noisy: config -> whether training draws a key for it from the stream `gate`.
      grouped: config -> whether the tokens of a group compete.
      idle: config -> those of its own fields that have no effect under this config, and why.
      untrained: config -> why no gradient reaches the gate unless there is a balance loss; "" if
        one does.
    """

    config: type[RouterConfig]
    gate: Callable[[Any, str], nn.Module]
    route: Callable[[Any, Array, PRNGKeyArray | None], Routing]
    balance: tuple[str, ...] = ()
    noisy: Callable[[Any], bool] = lambda config: False
    grouped: Callable[[Any], bool] = lambda config: False
    idle: Callable[[Any], Mapping[str, str]] = lambda config: {}
    untrained: Callable[[Any], str] = lambda config: ""
