"""Runners for NAC's regularizers and graph priors."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax import losses, regularizers
from m2mkd_jax.nac import graphs, priors
from m2mkd_jax.nac.kernel import KernelConfig, cosine_distance, exp_kernel
from parity.cases import Comparison

SETS = ("input", "mediator", "output")
SIGNATURES = "latent_graphs.0.{}_latents.signatures_"
BANDWIDTH = r"latent_graphs\.0\.propagators\.(\d+)\.latent_attention\.kernel\.bandwidth"
GRADIENT_TOLERANCE = 1e-4  # where the json states a tolerance for outputs only

# The original's name of a deterministic graph -> (ours, its arguments -> our fields).
FIXED_GRAPHS: dict[str, tuple[str, dict[str, str]]] = {
    "ring-of-cliques": (
        "ring_of_cliques",
        {"num_cliques": "communities", "clique_size": "community_size"},
    ),
    "grid-graph": ("grid", {"dim": "dims", "periodic": "periodic"}),
    "barbell": ("barbell", {"m1": "community_size"}),
    "hypercube": ("hypercube", {}),
}


def run_hinge(case) -> Iterable[Comparison]:
    """Signature hinge repulsion, as the only term of the weighted sum in training."""
    settings = case.config["config"]
    config = regularizers.HingeConfig(
        weight=1.0, hinge=settings["hinge"], reduction=settings["reduction"]
    )
    return _compare_term(case, regularizers.RegularizersConfig(hinge=config))


def run_mixture(case) -> Iterable[Comparison]:
    """Mixture of Gaussians over the distances, with given components."""
    settings, arrays = case.config["config"], case.arrays
    parts = (arrays[f"inputs/component_{name}"] for name in ("weights", "means", "sigmas"))
    mixture = regularizers.Mixture(*(part.reshape(settings["num_components"]) for part in parts))

    def loss(params):
        signatures = jnp.concatenate([params["graph"][name]["signatures"] for name in SETS])
        return regularizers.mixture_loss(signatures, mixture, reduction=settings["reduction"])

    return _compare(case, loss)


def run_blocks(case) -> Iterable[Comparison]:
    """Stochastic block model: link matrices, costs, assigned rows, loss."""
    settings, arrays = case.config["config"], case.arrays
    chosen = [name for name in SETS if settings.get(f"regularize_{name}_latents", True)]
    kernel = KernelConfig(truncation=settings.get("truncation", KernelConfig().truncation))
    shape = {
        "clusters": settings["num_clusters"],
        "within": settings["p_in"],
        "between": settings["p_out"],
    }
    params = _params(case)
    bandwidths = jnp.stack(regularizers.find_bandwidths(params, _kernels(params, kernel)))

    def links_of(params):
        signatures = jnp.concatenate([params["graph"][name]["signatures"] for name in chosen])
        distance = cosine_distance(signatures, signatures)
        own = regularizers.find_bandwidths(params, _kernels(params, kernel))
        return jnp.stack([exp_kernel(distance, bandwidth, kernel) for bandwidth in own])

    tolerance = case.tolerance("float32")
    links = links_of(params)
    count = links.shape[-1]
    size = count // settings["num_clusters"]
    targets = regularizers.block_targets(count, **shape)
    costs = regularizers.assignment_cost(links, targets)
    blocks = np.asarray(regularizers.assign_blocks(costs))
    yield "graphon", np.repeat(targets, size, axis=0), arrays["inputs/sampled_graphon"], 0, 0
    for i in range(len(bandwidths)):
        want = arrays[f"outputs/link_probability/{i}"]
        yield f"link_probability/{i}", links[i], want, *tolerance
        # The original has one row per copy of a block, and one column per row of the kernel.
        got = np.repeat(np.asarray(costs[i]).T, size, axis=0)
        yield f"assignment_cost/{i}", got, arrays[f"outputs/assignment_cost/{i}"], *tolerance
        # Which copy of a block a row gets is arbitrary.
        rows = arrays[f"outputs/row_assignment/{i}"]
        yield f"row_assignment/{i}", blocks[i][rows], np.arange(count) // size, 0, 0

    clip = settings.get("clip")
    yield from _compare(
        case, lambda params: regularizers.block_loss(links_of(params), clip=clip, **shape)
    )
    latents = {("mediator",): "mediator", SETS: "all"}.get(tuple(chosen))
    if latents is not None:  # the only choices that a config offers
        config = regularizers.BlocksConfig(weight=1.0, latents=latents, clip=clip, **shape)
        regularizer = regularizers.make_regularizer(
            regularizers.RegularizersConfig(blocks=config),
            _signatures(params),
            kernels=_kernels(params, kernel),
        )
        yield "config/loss", regularizer(params, 0.0)[0], arrays["outputs/loss"], *tolerance


def run_weighted_sum(case) -> Iterable[Comparison]:
    """Soft-target cross entropy plus hinge repulsion with a scheduled weight."""
    settings, arrays, tolerance = case.config["config"], case.arrays, case.tolerance("float32")
    start, stop = map(
        float, re.fullmatch(r"linear\(start=(.+?), *stop=(.+?)\)", settings["schedule"]).groups()
    )
    stated = re.search(r"hinge repulsion (\S+) (sum|mean)", case.config["description"]).groups()
    term = regularizers.HingeConfig(
        weight=start,
        weight_end=stop,
        hinge=settings.get("hinge", float(stated[0])),
        reduction=settings.get("reduction", stated[1]),
    )
    params = _params(case)
    regularizer = regularizers.make_regularizer(
        regularizers.RegularizersConfig(hinge=term),
        _signatures(params),
        kernels=_kernels(params, KernelConfig()),
    )
    logits, target = (jnp.asarray(arrays[f"inputs/{key}"]) for key in ("logits", "soft_target"))
    label_loss = losses.soft_cross_entropy(logits, target)
    total = settings["total"]

    def loss(params, epoch):
        return label_loss + regularizer(params, epoch / total)[0]

    term_alone = regularizer(params, 0.0)[1]["regularizer/hinge"]
    yield "classification", label_loss, arrays["outputs/classification"], *tolerance
    yield "graph_sparsity", term_alone, arrays["outputs/graph_sparsity"], *tolerance
    for key in [key for key in arrays if key.startswith("outputs/weight_epoch")]:
        epoch = int(key.removeprefix("outputs/weight_epoch"))
        weight = regularizers.weight_at(start, stop, epoch / total)
        yield f"weight_epoch{epoch}", weight, arrays[key], *tolerance
        want = arrays[f"outputs/loss_epoch{epoch}"]
        yield f"loss_epoch{epoch}", loss(params, epoch), want, *tolerance
    yield from _compare(case, lambda params: loss(params, settings["current"]))


def run_prior(case) -> Iterable[Comparison]:
    """Fitting signatures to a graph: loss curve, signatures during the fit, agreement."""
    settings, arrays, stated = case.config["config"], case.arrays, case.config["tolerance"]
    nodes, steps = settings["num_latents"], settings.get("num_iters", 1000)
    match = re.search(r"use_hinge_loss=(\w+)", case.config["description"])
    hinge = settings.get("use_hinge_loss", match is None or match[1] == "True")

    def allowed(name: str) -> tuple[float, float]:
        return stated[name].get("atol", 0.0), stated[name].get("rtol", 0.0)

    def config_of(steps: int) -> priors.PriorConfig:
        return priors.PriorConfig(
            truncation=settings.get("truncation", 0.8),
            learning_rate=settings.get("learning_rate", 1e-3),
            steps=steps,
            hinge=hinge,
        )

    adjacency = _adjacency(case, nodes)
    init = jnp.asarray(arrays["inputs/init"])
    signatures, curve = priors.fit_signatures(adjacency, init, config_of(steps))
    curve = np.asarray(curve)[arrays["outputs/loss_steps"]]
    yield "loss_curve", curve, arrays["outputs/loss_curve"], *allowed("loss_curve")
    for key in [key for key in arrays if key.startswith("outputs/signatures_")]:
        name = key.removeprefix("outputs/")
        when = name.removeprefix("signatures_")
        after = steps if when == "final" else int(when)
        got = (
            signatures
            if after == steps
            else priors.fit_signatures(adjacency, init, config_of(after))[0]
        )
        yield name, got, arrays[key], *allowed(name)
        if f"pairwise_cosine_{when}" in stated:
            cosines = [1 - cosine_distance(x, x) for x in (got, jnp.asarray(arrays[key]))]
            yield f"pairwise_cosine_{when}", *cosines, *allowed(f"pairwise_cosine_{when}")
    if not hinge:
        score = priors.path_error(signatures, adjacency)
        yield "score", score, case.config["score"], *allowed("loss_curve")
        return
    truncation = config_of(steps).truncation
    score = priors.disagreement(signatures, adjacency, truncation)
    yield "score", score, arrays["outputs/score"], *allowed("score")
    if (info := case.config.get("info")) is not None:
        missed, spurious = priors.count_errors(signatures, adjacency, truncation)
        pairs = allowed("score")[0] * nodes**2 / 2  # the score's tolerance as a number of pairs
        yield "edges", adjacency.sum() // 2, info["edges"], 0, 0
        yield "missed", missed, info["missed"], pairs, 0
        yield "spurious", spurious, info["spurious"], pairs, 0
    if settings.get("graph_type") in FIXED_GRAPHS:
        name, fields = FIXED_GRAPHS[settings["graph_type"]]
        stated = settings["graph_generator_kwargs"].items()
        values = {fields[key]: value for key, value in stated if key in fields}
        if "dims" in values:
            values["dims"] = tuple(values["dims"])
        graph = graphs.make_graph(graphs.PriorConfig(graph=name, **values), nodes=nodes, seed=0)
        yield "adjacency", graph, adjacency, 0, 0


def _adjacency(case, nodes: int) -> np.ndarray:
    if "inputs/adjacency" in case.arrays:
        return case.arrays["inputs/adjacency"].astype(bool)
    bits = np.unpackbits(case.arrays["inputs/adjacency_packed"])
    return bits[: nodes**2].reshape(nodes, nodes).astype(bool)


def _params(case) -> dict[str, Any]:
    """The case's parameters as the tree of a NAC, with empty read-in and read-out."""
    arrays = {k: jnp.asarray(v) for k, v in case.arrays.below("params/").items()}
    graph = {name: {"signatures": arrays[SIGNATURES.format(name)]} for name in SETS}
    params: dict[str, Any] = {"graph": graph, "stage_0": {}}
    layers = {int(m[1]): v for k, v in arrays.items() if (m := re.fullmatch(BANDWIDTH, k))}
    for layer, bandwidth in layers.items():
        params[f"stage_{layer + 1}"] = {"attention": {"bandwidth": bandwidth}}
    params[f"stage_{len(layers) + 1}"] = {}
    return params


def _signatures(params) -> dict[str, jax.Array]:
    return {name: params["graph"][name]["signatures"] for name in SETS}


def _kernels(params, kernel: KernelConfig) -> list[KernelConfig]:
    return [kernel] * (len(params) - 3)  # all but graph, read-in and read-out


def _compare_term(case, config: regularizers.RegularizersConfig) -> Iterable[Comparison]:
    params = _params(case)
    regularizer = regularizers.make_regularizer(
        config, _signatures(params), kernels=_kernels(params, KernelConfig())
    )
    return _compare(case, lambda params: regularizer(params, 0.0)[0])


def _compare(case, loss: Callable[[Any], jax.Array]) -> Iterable[Comparison]:
    """Compares `outputs/loss` and all gradients in the case."""
    tolerance = case.tolerance("float32")
    value, gradients = jax.value_and_grad(loss)(_params(case))
    yield "loss", value, case.arrays["outputs/loss"], *tolerance
    flat = {SIGNATURES.format(name): gradients["graph"][name]["signatures"] for name in SETS}
    for name, want in case.arrays.below("grads/").items():
        if match := re.fullmatch(BANDWIDTH, name):
            got = gradients[f"stage_{int(match[1]) + 1}"]["attention"]["bandwidth"]
        else:
            got = flat[name]
        yield f"grads/{name}", got, want, *(max(t, GRADIENT_TOLERANCE) for t in tolerance)
