"""Graph priors: signatures fitted to a graph before training."""

import dataclasses
import functools
import hashlib
import io
import json
import logging
from collections.abc import Mapping

import jax
import numpy as np
import optax
from etils import epath
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float

from common_jax.untrusted import brief, read_npz
from common_jax.workdir import write_bytes
from m2mkd_jax.nac.graphs import PriorConfig, find_communities, make_graph
from m2mkd_jax.nac.kernel import cosine_distance

FILE = "prior.npz"
ADAM_EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class Prior:
    """A graph and the signatures fitted to it.

    Attributes:
      adjacency: (T, T) bool, adjacency of the graph.
      communities: (T,) int, the community of each node.
      signatures: (T, Y) float32, fitted to the graph.
      disagreement: share of pairs that are connected in either graph or signatures but not both;
        with hinge=False the mean squared error of the distances.
      edges, missed, spurious: number of edges of the graph, of graph edges that the signatures
        lack, and of edges that only the signatures have.
    """

    adjacency: np.ndarray
    communities: np.ndarray
    signatures: np.ndarray
    disagreement: float
    edges: int
    missed: int
    spurious: int


def prepare_prior(
    config: PriorConfig,
    *,
    nodes: int,
    signature_width: int,
    seed: int,
    cache: epath.PathLike | None = None,
) -> Prior | None:
    """Makes the prior of a run, or reads the one that the run made earlier (NAC, graph priors;
    seeding.py of the original).

    All processes get the prior of process 0.

    Args:
      config: graph and fit.
      nodes: number T of mediators.
      signature_width: width Y.
      seed: seed of the graph and of the signatures before the fit.
      cache: folder with the prior in FILE; a file with other settings, or a damaged one, is
        replaced.

    Returns:
      The prior; None for the graph "none".

    Raises:
      ValueError: if the graph cannot have that many nodes.
    """
    if config.graph == "none":
        return None
    path = epath.Path(cache) / FILE if cache is not None else None
    settings = [dataclasses.asdict(config), nodes, signature_width, seed]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    prior = None
    if path is not None and path.exists():
        prior = _read(path, fingerprint, nodes, signature_width)
    if prior is None:
        prior = _make(config, nodes, signature_width, seed)
        if path is not None and jax.process_index() == 0:
            _write(path, prior, fingerprint)
    if jax.process_count() > 1:
        # Fits on different hosts may differ in the last bits, but replicated parameters must not.
        prior = _as_prior(multihost_utils.broadcast_one_to_all(dataclasses.asdict(prior)))
    logging.info(
        "graph prior %s: %d nodes, %d edges; signatures miss %d, add %d, disagreement %.3g",
        config.graph,
        nodes,
        prior.edges,
        prior.missed,
        prior.spurious,
        prior.disagreement,
    )
    return prior


def draw_signatures(key: jax.Array, *, nodes: int, width: int) -> Float[Array, "T Y"]:
    """Draws the signatures before the fit: a random matrix with orthonormal columns, or with
    orthonormal rows if there are fewer nodes than `width`."""
    return jax.nn.initializers.orthogonal()(key, (nodes, width), jnp.float32)


def fit_signatures(
    adjacency: Bool[np.ndarray, "T T"],
    init: Float[Array | np.ndarray, "T Y"],
    config: PriorConfig,
) -> tuple[Float[Array, "T Y"], Float[Array, " _"]]:
    r"""Minimises 1/T^2 sum_ts [A_ts max(tau, d_ts) + (1 - A_ts) max(-tau, -d_ts)] with Adam.

    A = `adjacency`, d = cosine distances of the signatures, tau = `config.truncation`; a node is
    not connected to itself. With hinge=False: the mean of (d_ts - l_ts / max l)^2, with l the
    lengths of shortest paths. (NAC, graph priors; seeding.py of the original.)

    Returns:
      Signatures after `config.steps` updates, and the losses after 0, 1, ... `config.steps` of
      them.
    """
    target = np.asarray(adjacency, np.float32) if config.hinge else scaled_paths(adjacency)
    return _fit(
        jnp.asarray(target),
        jnp.asarray(init, jnp.float32),
        config.learning_rate,
        truncation=config.truncation if config.hinge else None,
        steps=config.steps,
    )


def scaled_paths(adjacency: Bool[np.ndarray, "T T"]) -> Float[np.ndarray, "T T"]:
    """Returns the lengths of shortest paths, divided by the longest; 0 where there is no path."""
    from scipy.sparse import csgraph  # takes half a second to import

    lengths = csgraph.shortest_path(np.asarray(adjacency, float), directed=False, unweighted=True)
    lengths = np.where(np.isfinite(lengths), lengths, 0)
    # The 1 is for a graph without edges.
    return (lengths / max(1, lengths.max())).astype(np.float32)


def disagreement(
    signatures: Float[Array | np.ndarray, "T Y"],
    adjacency: Bool[np.ndarray, "T T"],
    truncation: float,
) -> float:
    """Returns the share of the T^2 pairs connected in either the graph or the signatures, not both.

    Signatures connect pairs that are nearer than `truncation`; a node paired with itself never
    disagrees.
    """
    near = np.asarray(_is_near(signatures, truncation)) & ~np.eye(len(adjacency), dtype=bool)
    return float(np.mean(near != adjacency, dtype=np.float32))


def path_error(
    signatures: Float[Array | np.ndarray, "T Y"], adjacency: Bool[np.ndarray, "T T"]
) -> float:
    """Returns the mean squared difference between the signatures' distances and `scaled_paths`."""
    return float(_loss(jnp.asarray(signatures), jnp.asarray(scaled_paths(adjacency)), None))


def count_errors(
    signatures: Float[Array | np.ndarray, "T Y"],
    adjacency: Bool[np.ndarray, "T T"],
    truncation: float,
) -> tuple[int, int]:
    """Counts the graph's edges that the signatures lack, and the edges only in the signatures."""
    near = np.triu(_is_near(signatures, truncation), 1)
    edges = np.triu(adjacency, 1)
    return int(np.sum(edges & ~near)), int(np.sum(near & ~edges))


def _is_near(signatures, truncation: float) -> np.ndarray:
    signatures = jnp.asarray(signatures, jnp.float32)
    return np.asarray(cosine_distance(signatures, signatures) < truncation)


def _loss(signatures: jax.Array, target: jax.Array, truncation: float | None) -> jax.Array:
    # (T, T) with the diagonal, which counts as no edge: its distance of 0 adds a constant.
    distance = cosine_distance(signatures, signatures)
    if truncation is None:
        return jnp.mean((distance - target) ** 2)
    # A pair on its right side of the truncation has a constant term and no gradient: only edges
    # that are too long are shortened, and only other pairs that are too near moved apart.
    edge, no_edge = jnp.maximum(truncation, distance), jnp.maximum(-truncation, -distance)
    return jnp.mean(jnp.where(target > 0, edge, no_edge))


@functools.partial(jax.jit, static_argnames=("truncation", "steps"))
def _fit(target, init, learning_rate, *, truncation: float | None, steps: int):
    adam = optax.adam(learning_rate, b1=0.9, b2=0.999, eps=ADAM_EPS)

    def update(carry, _):
        signatures, state = carry
        loss, gradient = jax.value_and_grad(_loss)(signatures, target, truncation)
        updates, state = adam.update(gradient, state)
        return (optax.apply_updates(signatures, updates), state), loss

    (signatures, _), losses = jax.lax.scan(update, (init, adam.init(init)), length=steps)
    # The scan records each loss before its update, so the final loss is computed here.
    last = _loss(signatures, target, truncation)
    return signatures, jnp.append(losses, last)


def _make(config: PriorConfig, nodes: int, width: int, seed: int) -> Prior:
    adjacency = make_graph(config, nodes=nodes, seed=seed)
    if config.graph == "complete":
        # Nothing to fit: identical signatures are at distance 0.
        signatures = np.tile(np.eye(1, width, dtype=np.float32), (nodes, 1))
    else:
        init = draw_signatures(jax.random.key(seed), nodes=nodes, width=width)
        signatures = np.asarray(fit_signatures(adjacency, init, config)[0])
    hinge = config.hinge or config.graph == "complete"
    missed, spurious = count_errors(signatures, adjacency, config.truncation)
    return Prior(
        adjacency=adjacency,
        communities=find_communities(config, adjacency, seed=seed),
        signatures=signatures,
        disagreement=disagreement(signatures, adjacency, config.truncation)
        if hinge
        else path_error(signatures, adjacency),
        edges=int(adjacency.sum()) // 2,
        missed=missed,
        spurious=spurious,
    )


def _write(path: epath.PathLike, prior: Prior, fingerprint: str) -> None:
    file = io.BytesIO()
    np.savez(file, fingerprint=fingerprint, **dataclasses.asdict(prior))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, file.getvalue())


def _read(path: epath.Path, fingerprint: str, nodes: int, width: int) -> Prior | None:
    """Reads the file of `_write`; None if it has another fingerprint or cannot be read."""
    forms = _forms(nodes, width)
    try:
        arrays = read_npz(path, ("fingerprint", *forms))
        stored = arrays.pop("fingerprint")
        # First, and without a warning: a file with other settings is no damage, though its shapes
        # differ.
        if stored.ndim == 0 and stored.dtype.kind == "U" and str(stored) != fingerprint:
            return None
        for name, (kind, shape) in forms.items():
            if arrays[name].dtype.kind != kind or arrays[name].shape != shape:
                raise ValueError(
                    f"{path} is damaged ({name} is {arrays[name].dtype} "
                    f"{brief(arrays[name].shape)}, expected {shape})"
                )
        if stored.ndim or stored.dtype.kind != "U":
            raise ValueError(f"{path} is damaged (it has no fingerprint)")
    except (OSError, ValueError) as error:
        logging.warning("%s; the graph prior will be made again", error)
        return None
    return _as_prior(arrays)


def _forms(nodes: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns the dtype kind and the shape of each field of a Prior."""
    return {
        "adjacency": ("b", (nodes, nodes)),
        "communities": ("i", (nodes,)),
        "signatures": ("f", (nodes, width)),
        "disagreement": ("f", ()),
        "edges": ("i", ()),
        "missed": ("i", ()),
        "spurious": ("i", ()),
    }


def _as_prior(values: Mapping[str, np.ndarray]) -> Prior:
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return Prior(**{k: v if v.ndim else v.item() for k, v in arrays.items()})
