"""Soft MoE: every slot takes a weighted mean of an example's tokens, every token one of all outputs
(Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts", algorithm 1).

    z_tec = <x_t / |x_t|, scale phi_ec / |phi_ec|>
    dispatch = softmax of z over the tokens t:      slot_ec = sum_t dispatch_tec x_t
    combine  = softmax of z over all slots e,c:     y_t = sum_ec combine_tec expert_e(slot_ec)

There is no discrete choice, so nothing is dropped, no gradient is cut off, and all experts have
equal work: there are no balance losses, no noise and no groups. Examples do not mix.

Axes: B examples, T tokens, E experts, C slots per expert, R = B C rows per expert, D width.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float

from common_jax.ranges import Size
from m2mkd_jax.moe.dispatch import over_mesh, serve_slots
from m2mkd_jax.moe.grouped import Experts
from m2mkd_jax.moe.routing import Router, RouterConfig


@dataclass(frozen=True)
class SoftConfig(RouterConfig):
    """The fields of `config.model.moe` that Soft MoE reads.

    slots_per_expert: C; None for T / E rounded up, about one slot per token over all experts.
    """

    # By keyword only: as a base, this class would put it second in `MoeConfig`, before `chosen`.
    slots_per_expert: Size | None = field(default=None, kw_only=True)


def unit(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """x / |x| along `axis`; 0, with a gradient of 0, where x is 0."""
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    # The inner where keeps 1 / 0 out of the unused branch: it would still make the gradient NaN.
    nonzero = square > 0
    return jnp.where(nonzero, x * jax.lax.rsqrt(jnp.where(nonzero, square, 1)), 0)


class SoftGate(nn.Module):
    """z_tec = <x_t / |x_t|, scale phi_ec / |phi_ec|>; `phi` (D, E, C) and `scale` ().

    Without both normalisations the logits would grow with the width, and the softmax would collapse
    to one-hot weights (section 2.3 of the paper).
    """

    config: SoftConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E C"]:
        _, tokens, width = x.shape
        experts = self.config.experts
        # By default the shape of phi depends on the number of tokens: such weights fit one image
        # size.
        slots = self.config.slots_per_expert or math.ceil(tokens / experts)
        phi = self.param("phi", nn.initializers.normal(width**-0.5), (width, experts, slots))
        scale = self.param("scale", nn.initializers.ones, ())
        # By default a TPU multiplies float32 in bfloat16.
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("BTD,DEC->BTEC", unit(x, -1), scale * unit(phi, 0), precision=exact)


class SoftSlots(NamedTuple):
    """Weights of dispatch and combine; each example is a group."""

    into: Float[Array, "B T E C"]
    out_of: Float[Array, "B T E C"]

    def dispatch(self, x: Float[Array, "B T D"]) -> Float[Array, "E R D"]:
        """slot_ec = sum_t dispatch_tec x_t, rows ordered by example."""
        # Experts first, then examples: the rows of an expert form one matrix, for `serve_slots`.
        slots = jnp.einsum("BTEC,BTD->EBCD", self.into.astype(x.dtype), x)
        return slots.reshape(slots.shape[0], -1, slots.shape[-1])

    def combine(self, answers: Float[Array, "E R D"]) -> Float[Array, "B T D"]:
        """y_t = sum_ec combine_tec answer_ec."""
        examples, _, experts, slots = self.out_of.shape
        answers = answers.reshape(experts, examples, slots, -1)
        # A token's sum has one term per slot, too many for bfloat16.
        wide = jnp.promote_types(answers.dtype, jnp.float32)
        weights = self.out_of.astype(answers.dtype)
        return jnp.einsum("BTEC,EBCD->BTD", weights, answers, preferred_element_type=wide)


@dataclass(frozen=True)
class SoftRouting:
    """The routing of a batch by its logits z, at least in float32."""

    logits: Float[Array, "B T E C"]

    def mix(
        self, x: Float[Array, "B T D"], experts: Experts
    ) -> tuple[Float[Array, "B T D"], Mapping[str, Array]]:
        """y_t = sum_ec combine_tec expert_e(sum_s dispatch_sec x_s).

        Metrics: load `[E]`, each expert's share of the combine weights; entropy of the combine
        weights, averaged over tokens; and dispatch_entropy of the dispatch weights, averaged over
        slots; both in nats.
        """
        weights = self.choices()
        slots = SoftSlots(weights["dispatch"], weights["combine"])
        # Examples are the groups here, so a device's slots are those of its own examples.
        y = over_mesh(serve_slots, x, slots, experts)
        metrics = {
            "load": jnp.mean(jnp.sum(slots.out_of, axis=3), axis=(0, 1)),
            "entropy": jnp.mean(_entropy(slots.out_of, axis=(2, 3))),
            "dispatch_entropy": jnp.mean(_entropy(slots.into, axis=1)),
        }
        return y, metrics

    def losses(self) -> Mapping[str, Callable[[], Float[Array, ""]]]:
        """No losses: all experts have the same number of slots anyway."""
        return {}

    def choices(self) -> Mapping[str, Array]:
        """Weights of dispatch and combine, `[B, T, E, C]`."""
        return {
            "dispatch": jax.nn.softmax(self.logits, axis=1),
            "combine": jax.nn.softmax(self.logits, axis=(2, 3)),
        }


def _entropy(weights: Float[Array, "B T E C"], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.sum(jax.scipy.special.entr(weights), axis=axis)


SOFT = Router(
    config=SoftConfig,
    gate=lambda config, name: SoftGate(config, name=name),
    route=lambda config, logits, key: SoftRouting(logits),
)
