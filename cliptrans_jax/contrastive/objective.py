"""The record of a contrastive loss: its formula and its learned numbers."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jax import numpy as jnp
from jaxtyping import Array, Float

Numbers = Mapping[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Learned:
    """A number that is learned with a loss.

    Attributes:
      start: initial value; None for log(config.clip.scale).
      most: upper limit in the loss; None for no limit.
    """

    start: float | None = None
    most: float | None = None


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """A loss of the pairs in a batch, against all other combinations of its texts and images.

    Attributes:
      loss: (texts (B, M), images (B, M), and the learned numbers by name) -> scalar.
      learned: by the name of the parameter under "clip".
      metrics: learned numbers -> metrics of a training step.
    """

    loss: Callable[..., Float[Array, ""]]
    learned: Mapping[str, Learned]
    metrics: Callable[[Numbers], Numbers]

    @property
    def takes_scale(self) -> bool:
        """True if config.clip.scale is read."""
        return any(number.start is None for number in self.learned.values())

    def init(self, scale: float) -> dict[str, Float[Array, ""]]:
        """Initial values of the learned numbers."""
        starts = {name: number.start for name, number in self.learned.items()}
        return {
            name: jnp.asarray(math.log(scale) if start is None else start)
            for name, start in starts.items()
        }

    def limit(self, params: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
        """The learned numbers in `params`, clipped to their limits."""
        return {
            name: params[name] if number.most is None else jnp.minimum(params[name], number.most)
            for name, number in self.learned.items()
        }


def unit(x: Float[Array, "B M"]) -> Float[Array, "B M"]:
    """The features, scaled to length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
