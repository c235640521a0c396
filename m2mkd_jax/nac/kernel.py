"""The strength of a connection between two signatures: distances, kernels, and sampled edges."""

import dataclasses
from typing import Annotated

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

from common_jax.config import Section
from common_jax.ranges import Positive, above, one_of
from m2mkd_jax.nac.layers import l2_normalise

EPS = 2.0**-23  # machine epsilon of float32
TINY = 2.0**-126  # smallest normal float32
TRUNCATIONS = ("direct", "masked")
EVALUATIONS = ("kernel", "sample", "threshold")
EMPTY_ROWS = ("zero", "nan")


@dataclasses.dataclass(frozen=True)
class KernelConfig(Section):
    """The kernel that modulates the latents' attention, `config.model.kernel`.

    Attributes:
      truncation: distance beyond which two latents are not connected; None connects all.
      truncation_kind: "direct" keeps distances up to the truncation and sets the others to
        infinity; "masked" keeps distances below it and multiplies by a mask.
      straight_through: gives cut edges the gradient that they would have without the cut. With
        masked truncation only the exponential form does so, as in the original.
      stochastic: samples the edges in training (relaxed Bernoulli).
      temperature: temperature of the samples.
      evaluation: how a stochastic kernel is evaluated: the "kernel" itself, a "sample" of the
        edges, or "threshold", only the edges with an affinity of at least 1/2.
      bandwidth: bandwidth of the kernel, or its initial value if it is learned.
      learnable_bandwidth: whether the bandwidth is a parameter; nothing keeps it positive.
      empty_row: the output for a receiver without any edge: "zero", or "nan" as in the original.
    """

    truncation: Annotated[float, above(0, 2)] | None = 0.9
    truncation_kind: Annotated[str, one_of(*TRUNCATIONS)] = "direct"
    straight_through: bool = True
    stochastic: bool = True
    temperature: Positive = 0.5
    evaluation: Annotated[str, one_of(*EVALUATIONS)] = "kernel"
    bandwidth: Positive = 1.0
    learnable_bandwidth: bool = True
    empty_row: Annotated[str, one_of(*EMPTY_ROWS)] = "zero"


def cosine_distance(
    receivers: Float[Array, "*B T Y"], senders: Float[Array, "*B S Y"]
) -> Float[Array, "*B T S"]:
    """Returns 1 - a.b of the normalised signatures a, b: from 0 (same direction) to 2."""
    # In float32 with exact products: in bfloat16, or at the MXU's default precision, rounding would
    # move edges across the truncation.
    receivers = l2_normalise(receivers.astype(jnp.promote_types(receivers.dtype, jnp.float32)))
    senders = l2_normalise(senders.astype(jnp.promote_types(senders.dtype, jnp.float32)))
    return 1 - jnp.matmul(receivers, jnp.swapaxes(senders, -1, -2), precision="highest")


def log_kernel(
    distance: Float[Array, "*B T S"], bandwidth: Float[Array, ""] | float, config: KernelConfig
) -> Float[Array, "*B T S"]:
    """Returns -d / beta, or minus infinity for cut edges (NAC, DotProductKernel, log form).

    d = `distance`, beta = `bandwidth`.
    """
    scaled = distance / bandwidth
    if config.truncation is None:
        return -scaled
    within = _within_truncation(distance, bandwidth, config)
    if config.truncation_kind == "masked":
        # A sum rather than a selection, so that -scaled always keeps its gradient.
        return -scaled + jnp.where(within, 0.0, -jnp.inf)
    cut = jnp.where(within, -scaled, -jnp.inf)
    return _with_gradient_of(-scaled, cut) if config.straight_through else cut


def exp_kernel(
    distance: Float[Array, "*B T S"], bandwidth: Float[Array, ""] | float, config: KernelConfig
) -> Float[Array, "*B T S"]:
    """Returns exp(-d / beta), or 0 for cut edges (NAC, DotProductKernel, exponential form)."""
    scaled = distance / bandwidth
    if config.truncation is None:
        return jnp.exp(-scaled)
    if config.truncation_kind == "direct":
        # Straight-through or not, a cut edge has no gradient here: exp(-inf) = 0 is a factor of it.
        return jnp.exp(log_kernel(distance, bandwidth, config))
    uncut = jnp.exp(-scaled)
    cut = jnp.where(_within_truncation(distance, bandwidth, config), uncut, 0.0)
    return _with_gradient_of(uncut, cut) if config.straight_through else cut


def sample_log(
    log_affinity: Float[Array, "*#B T S"], uniform: Float[Array, "*B T S"], *, temperature: float
) -> Float[Array, "*B T S"]:
    r"""Returns the log of a relaxed Bernoulli sample of the edges (NAC, stochastic kernel).

    log sigmoid((logit u + logit p) / temperature), clipped to [log tiny, log(1 - eps)], with p =
    exp(`log_affinity`) and u = `uniform` both clipped to [eps, 1 - eps], where eps is the machine
    epsilon of float32. So a cut edge has p = eps: it is unlikely but not impossible, and gets no
    gradient. Neither does an edge with p = 1, such as that of a latent with itself.
    """
    p = jnp.clip(jnp.exp(log_affinity), EPS, 1 - EPS)
    u = jnp.clip(uniform, EPS, 1 - EPS)
    # log1p(-p), not log(1 - p): the difference drops the low digits of a small p.
    logits = (jnp.log(u) - jnp.log1p(-u) + jnp.log(p) - jnp.log1p(-p)) / temperature
    # The original takes the log of a clipped sigmoid, which rounds to 0 or 1 first. The two agree
    # to 1e-6.
    return jnp.clip(jax.nn.log_sigmoid(logits), jnp.log(TINY), jnp.log1p(-EPS))


def threshold_log(log_affinity: Float[Array, "*B T S"]) -> Float[Array, "*B T S"]:
    """Returns 0 for affinities of at least 1/2, else minus infinity."""
    return jnp.where(log_affinity >= jnp.log(0.5), 0.0, -jnp.inf)


def normalise_log_rows(
    log_affinity: Float[Array, "*B T S"], *, empty_row: str
) -> Float[Array, "*B T S"]:
    """Normalises log affinities, such that the affinities sum to 1 over the senders.

    A row without an edge stays empty, or becomes NaN if `empty_row` is "nan".
    """
    if empty_row == "nan":
        return log_affinity - jax.nn.logsumexp(log_affinity, axis=-1, keepdims=True)
    # Fill empty rows before the logsumexp, whose gradient over them would be NaN.
    empty = is_empty(log_affinity)
    filled = jnp.where(empty, 0.0, log_affinity)
    rows = filled - jax.nn.logsumexp(filled, axis=-1, keepdims=True)
    return jnp.where(empty, -jnp.inf, rows)


def normalise_rows(affinity: Float[Array, "*B T S"], *, empty_row: str) -> Float[Array, "*B T S"]:
    """Normalises affinities to sum to 1 over the senders.

    A row without an edge stays 0, or becomes NaN if `empty_row` is "nan".
    """
    total = jnp.sum(affinity, axis=-1, keepdims=True)
    if empty_row == "nan":
        return affinity / total
    return affinity / jnp.where(total == 0, 1.0, total)


def is_empty(log_affinity: Float[Array, "*B T S"]) -> jax.Array:
    """Returns True for receivers without an edge, (*B, T, 1) bool."""
    return jnp.all(jnp.isneginf(log_affinity), axis=-1, keepdims=True)


def _within_truncation(distance, bandwidth, config: KernelConfig) -> jax.Array:
    # Compared after the division, as in the original: a negative bandwidth reverses the order.
    bandwidth = jax.lax.stop_gradient(bandwidth)
    if config.truncation_kind == "direct":
        return distance / bandwidth <= config.truncation / bandwidth
    return distance < config.truncation


def _with_gradient_of(source: jax.Array, value: jax.Array) -> jax.Array:
    """Returns `value` with the gradient of `source`."""
    # The added difference is exactly 0, so `value` is returned unrounded, even where infinite; the
    # usual source + stop_gradient(value - source) would round.
    return jax.lax.stop_gradient(value) + (source - jax.lax.stop_gradient(source))
