"""The record of a contrastive loss: its formula and its learned scalars."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

Numbers = Mapping[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Learned:
    """A learned scalar of a loss.

    Attributes:
      start: initial value; None for log(config.clip.scale).
      most: upper bound applied in the loss; None for no bound.
    """

    start: float | None = None
    most: float | None = None


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """A loss that contrasts the pairs in a batch with all other combinations of text and image.

    Attributes:
      loss: (texts (B, M), images (B, M), learned scalars by name) -> scalar.
      learned: learned scalars by the name of their parameter under "clip".
      metrics: learned scalars -> metrics of a training step.
      smallest: smallest batch from which anything is learned.
    """

    loss: Callable[..., Float[Array, ""]]
    learned: Mapping[str, Learned]
    metrics: Callable[[Numbers], Numbers]
    smallest: int = 1

    @property
    def takes_scale(self) -> bool:
        """True if config.clip.scale is read."""
        return any(number.start is None for number in self.learned.values())

    def init(self, scale: float) -> dict[str, Float[Array, ""]]:
        """Initial values of the learned scalars."""
        starts = {name: number.start for name, number in self.learned.items()}
        # A scale is learned as its logarithm, so that it stays positive.
        return {
            name: jnp.asarray(math.log(scale) if start is None else start)
            for name, start in starts.items()
        }

    def limit(self, params: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
        """The learned scalars in `params`, clipped to their bounds."""
        return {
            name: params[name] if number.most is None else at_most(params[name], number.most)
            for name, number in self.learned.items()
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_most(x: Float[Array, ""], most: float) -> Float[Array, ""]:
    """min(x, most), with a gradient beyond the bound too, unless it points further away from it.

    With `jnp.minimum`, a scalar that once passed the bound would get no gradient and stay there.
    CLIP clips the parameter itself after every update instead.
    """
    return jnp.minimum(x, most)


def _at_most_forward(x: jax.Array, most: float) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(x, most), x >= most


def _at_most_backward(most: float, beyond: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    del most
    # Descent subtracts the gradient, so a negative one would raise x further.
    return (jnp.where(beyond & (gradient < 0), 0, gradient),)


at_most.defvjp(_at_most_forward, _at_most_backward)


def unit(x: Float[Array, "B M"]) -> Float[Array, "B M"]:
    """The features, scaled to length 1."""
    # Without an epsilon, as in CLIP. Done here, not in the towers: a prefix is computed from
    # features of any length.
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
