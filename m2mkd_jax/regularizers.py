"""Regularisers that shape a NAC's graph, and their weighted sum, which is added to the label loss.

They depend only on the latents' signatures and, for the block model, on the kernels' bandwidths.

Axes: T latents that receive, S latents that send, Y signature.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from common_jax.config import Section
from common_jax.ranges import Fraction, NonNegative, Positive, Size, above, one_of
from m2mkd_jax.assignment import assign_blocks
from m2mkd_jax.nac.kernel import KernelConfig, cosine_distance, exp_kernel
from m2mkd_jax.stages import stage_number

LATENTS = types.MappingProxyType(
    {"mediator": ("mediator",), "all": ("input", "mediator", "output")}
)
REDUCTIONS = types.MappingProxyType(
    {
        "sum": lambda values, chosen: jnp.sum(jnp.where(chosen, values, 0.0)),
        # 0, not NaN, if nothing is chosen.
        "mean": lambda values, chosen: (
            jnp.sum(jnp.where(chosen, values, 0.0)) / jnp.maximum(1, jnp.sum(chosen))
        ),
    }
)

Scalar = Float[Array, ""]
Signatures = Float[Array | np.ndarray, "_ Y"]  # of one kind of latents, on device or host
Metrics = dict[str, Scalar]
Params = Mapping[str, Any]
Regularizer = Callable[[Params, float | Scalar], tuple[Scalar, Metrics]]


@dataclasses.dataclass(frozen=True)
class HingeConfig(Section):
    """Repulsion of nearby signatures, `config.regularizers.hinge`.

    Attributes:
      weight: initial weight of the term.
      weight_end: final weight, reached linearly; None for a constant weight.
      hinge: distance beyond which signatures do not repel.
      reduction: "sum" or "mean" over the pairs within `hinge`.
    """

    weight: NonNegative = 0.0
    weight_end: NonNegative | None = None
    hinge: Annotated[float, above(0, 2)] = 0.4
    reduction: Annotated[str, one_of(*REDUCTIONS)] = "sum"


@dataclasses.dataclass(frozen=True)
class MixtureConfig(Section):
    """Keeps the initial distribution of distances, `config.regularizers.mixture`.

    Attributes:
      weight, weight_end: see HingeConfig.
      components: number of components of the Gaussian mixture.
      reduction: "mean" or "sum" over the pairs.
    """

    weight: NonNegative = 0.0
    weight_end: NonNegative | None = None
    components: Size = 3
    reduction: Annotated[str, one_of(*REDUCTIONS)] = "mean"


@dataclasses.dataclass(frozen=True)
class BlocksConfig(Section):
    """Pulls the kernels towards those of a stochastic block model, `config.regularizers.blocks`.

    Attributes:
      weight, weight_end: see HingeConfig.
      clusters: number of blocks, a divisor of the number of latents.
      within, between: target values of the kernel within a block and between blocks.
      latents: "mediator" or "all".
      clip: lower bound of squared errors; smaller errors have no gradient. None for no bound.
    """

    weight: NonNegative = 0.0
    weight_end: NonNegative | None = None
    clusters: Size = 8
    within: Fraction = 0.9
    between: Fraction = 0.2
    latents: Annotated[str, one_of(*LATENTS)] = "mediator"
    clip: Positive | None = None


@dataclasses.dataclass(frozen=True)
class RegularizersConfig(Section):
    """The terms, `config.regularizers`; a term whose weight is always 0 is not computed."""

    hinge: HingeConfig = HingeConfig()
    mixture: MixtureConfig = MixtureConfig()
    blocks: BlocksConfig = BlocksConfig()


def hinge_repulsion(
    signatures: Float[Array, "T Y"], *, hinge: float, reduction: str = "sum"
) -> Float[Array, ""]:
    r"""- sum_{t > s} d_ts [d_ts < h]:  pushes nearby signatures apart.

    d = cosine distances of `signatures`, h = `hinge`; "mean" divides by the number of pairs within
    h, and is 0 if there are none. (NAC, signature hinge repulsion; regularization.py of the
    original.)
    """
    distance = cosine_distance(signatures, signatures)
    return -REDUCTIONS[reduction](distance, _pairs(distance) & (distance < hinge))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of one-dimensional Gaussians, in float32."""

    weights: Float[np.ndarray, " components"]
    means: Float[np.ndarray, " components"]
    sigmas: Float[np.ndarray, " components"]


def mixture_loss(
    signatures: Float[Array, "T Y"], mixture: Mixture, *, reduction: str = "mean"
) -> Float[Array, ""]:
    r"""mean_{t > s} -log sum_k w_k N(d_ts; m_k, s_k):  keeps distances likely.

    d = cosine distances of `signatures`; w, m, s = weights, means and standard deviations of
    `mixture`. (NAC, signature distribution; regularization.py of the original.)
    """
    distance = cosine_distance(signatures, signatures)
    deviation = (distance[..., None] - mixture.means) / mixture.sigmas
    log_normal = -0.5 * deviation**2 - jnp.log(mixture.sigmas) - 0.5 * math.log(2 * math.pi)
    log_likelihood = jax.nn.logsumexp(jnp.log(mixture.weights) + log_normal, axis=-1)
    return REDUCTIONS[reduction](-log_likelihood, _pairs(distance))


def fit_mixture(signatures: Float[Array, "T Y"], *, components: int) -> Mixture:
    """Fits a mixture to the pairwise distances of the signatures by EM, on the host.

    Raises:
      ValueError: if there are fewer pairs than components.
    """
    distance = np.asarray(cosine_distance(signatures, signatures))
    pairs = distance[np.tril_indices(len(distance), -1)]
    if len(pairs) < components:
        raise ValueError(
            f"config.regularizers.mixture.components={components} is more than the {len(pairs)} "
            "pairs of latents; lower it"
        )
    from sklearn.mixture import GaussianMixture  # takes as long to import as JAX

    model = GaussianMixture(components, covariance_type="spherical", random_state=0)
    # In float32 the fit fails: a component of nearly equal distances gets zero variance.
    model.fit(pairs[:, None].astype(np.float64))
    return Mixture(
        *(
            np.asarray(values, np.float32).reshape(components)
            for values in (model.weights_, model.means_, np.sqrt(model.covariances_))
        )
    )


def block_loss(
    links: Float[Array, "*B T T"],
    *,
    clusters: int,
    within: float,
    between: float,
    clip: float | None = None,
) -> Float[Array, ""]:
    r"""sum_b 1/T^2 sum_ts max(c, (k_bts - g_z(b,t),s)^2):  pulls kernels towards a block model.

    k = `links`, kernels in exponential form; g_zs = `within` where s is in block z, else `between`;
    c = `clip`. Latent s is in block s // (T / clusters). z(b, t) assigns the rows of each kernel to
    blocks, T / clusters rows each, with the least total squared error. Only rows are matched, not
    columns. (NAC, stochastic block model; regularization.py of the original.)

    Raises:
      ValueError: if `clusters` does not divide T.
    """
    targets = block_targets(links.shape[-1], clusters=clusters, within=within, between=between)
    # The assignment has no gradient, so gradients reach the links only through the errors.
    assigned = assign_blocks(assignment_cost(links, targets))
    errors = (links - targets[assigned]) ** 2
    if clip is not None:
        errors = jnp.maximum(errors, clip)
    # A sum over the kernels of all iterations, as in the original, not a mean.
    return jnp.sum(jnp.mean(errors, axis=(-2, -1)))


def block_targets(
    latents: int, *, clusters: int, within: float, between: float
) -> Float[Array, "blocks T"]:
    """The target row of each block: `within` at its own latents, `between` elsewhere.

    Raises:
      ValueError: if `clusters` does not divide `latents`.
    """
    if latents % clusters:
        raise ValueError(
            f"config.regularizers.blocks.clusters={clusters} must divide the {latents} latents; "
            "change it or their number"
        )
    own = jnp.arange(clusters)[:, None] == jnp.arange(latents) // (latents // clusters)
    return jnp.where(own, within, between)


def assignment_cost(
    links: Float[Array, "*B T S"], targets: Float[Array, "blocks S"]
) -> Float[Array, "*B T blocks"]:
    """Mean squared error between each row of the kernels and each block's target row."""
    return jnp.mean((links[..., :, None, :] - targets) ** 2, axis=-1)


def weight_at(weight: float, weight_end: float | None, progress: float | Scalar) -> float | Scalar:
    """(1 - p) `weight` + p `weight_end`,  p = `progress`, the fraction of epochs done."""
    return weight if weight_end is None else (1 - progress) * weight + progress * weight_end


def make_regularizer(
    config: RegularizersConfig,
    signatures: Mapping[str, Signatures],
    *,
    kernels: Sequence[KernelConfig | None],
) -> Regularizer:
    """The weighted sum of the terms whose weight is not always 0.

    Args:
      config: the terms.
      signatures: initial signatures of `input`, `mediator` and `output` latents.
      kernels: kernel of each iteration's propagator, None if it has none.

    Returns:
      regularize(params, progress) -> the sum, and the unweighted terms as `regularizer/NAME`;
      progress is the fraction of epochs done, constant within an epoch.

    Raises:
      ValueError: if a term does not fit the latents.
    """
    terms: dict[str, tuple[Any, Callable[[Params], Scalar]]] = {}
    hinge, mixture, blocks = config.hinge, config.mixture, config.blocks
    if is_on(hinge):
        push = functools.partial(hinge_repulsion, hinge=hinge.hinge, reduction=hinge.reduction)
        terms["hinge"] = hinge, lambda params: push(_join(_signatures(params), "all"))
    if is_on(mixture):
        gaussians = fit_mixture(_join(signatures, "all"), components=mixture.components)
        terms["mixture"] = (
            mixture,
            lambda params: mixture_loss(
                _join(_signatures(params), "all"), gaussians, reduction=mixture.reduction
            ),
        )
    if is_on(blocks):
        settings = {"clusters": blocks.clusters, "within": blocks.within, "between": blocks.between}
        if None in kernels:
            raise ValueError(
                f"config.model.layerwise.kernel leaves iteration {kernels.index(None)} without a "
                "kernel, and config.regularizers.blocks pulls those of all iterations: give it a "
                "kernel, or set config.regularizers.blocks.weight and weight_end to 0"
            )
        # Only for its error, which would otherwise be raised while the step is traced.
        block_targets(len(_join(signatures, blocks.latents)), **settings)
        terms["blocks"] = (
            blocks,
            lambda params: block_loss(
                _links(params, blocks.latents, kernels), clip=blocks.clip, **settings
            ),
        )

    def regularize(params: Params, progress: float | Scalar) -> tuple[Scalar, Metrics]:
        total, metrics = jnp.float32(0), {}
        for name, (term, compute) in terms.items():
            value = metrics[f"regularizer/{name}"] = compute(params)
            total += weight_at(term.weight, term.weight_end, progress) * value
        return total, metrics

    return regularize


def find_bandwidths(params: Params, kernels: Sequence[KernelConfig]) -> list[float | Scalar]:
    """The bandwidth of each iteration's propagator: the learned parameter, or else the config's
    value."""
    stages = sorted(params.keys() - {"graph"}, key=stage_number)
    propagators = [params[stage] for stage in stages[1:-1]]  # between read-in and read-out
    # A propagator shared by all iterations has a single subtree.
    if len(propagators) == 1:
        propagators *= len(kernels)
    return [
        stage["attention"].get("bandwidth", kernel.bandwidth)
        for stage, kernel in zip(propagators, kernels, strict=True)
    ]


def _links(
    params: Params, latents: str, kernels: Sequence[KernelConfig]
) -> Float[Array, "iterations T T"]:
    joined = _join(_signatures(params), latents)
    distance = cosine_distance(joined, joined)
    bandwidths = find_bandwidths(params, kernels)
    # The kernel itself, not a sample of its edges, as in the original.
    links = [exp_kernel(distance, b, kernel) for b, kernel in zip(bandwidths, kernels, strict=True)]
    return jnp.stack(links)


def _signatures(params: Params) -> dict[str, Float[Array, "_ Y"]]:
    return {name: params["graph"][name]["signatures"] for name in LATENTS["all"]}


def _join(signatures: Mapping[str, Signatures], latents: str) -> Float[Array, "T Y"]:
    return jnp.concatenate([signatures[name] for name in LATENTS[latents]])


def _pairs(distance: Float[Array, "T T"]) -> Bool[Array, "T T"]:
    # Distances are symmetric: take each pair once, and no latent with itself.
    return jnp.tri(*distance.shape, k=-1, dtype=bool)


def is_on(term: HingeConfig | MixtureConfig | BlocksConfig) -> bool:
    """True unless the weight of a term is always 0."""
    return bool(term.weight or term.weight_end)
