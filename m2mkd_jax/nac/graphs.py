"""The mediator graphs that a NAC can start from."""

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Annotated

import networkx as nx
import numpy as np
from jaxtyping import Bool, Int

from common_jax.config import Section
from common_jax.ranges import (
    LARGEST_INT,
    SMALLEST,
    Count,
    Fraction,
    Interval,
    Positive,
    Size,
    Sizes,
    key_of,
)


@dataclasses.dataclass(frozen=True)
class PriorConfig(Section):
    """The graph that the mediators' signatures start from, `config.model.prior`.

    Attributes:
      graph: "none" (random normal signatures), "complete" (identical signatures, which connect all
        mediators), or a graph that the signatures are fitted to, a key of GENERATORS. Scale-free
        graphs are "barabasi_albert".
      attachments: barabasi_albert: edges that each new node brings.
      edge_probability: erdos_renyi: probability of an edge.
      communities: number of communities of planted_partition, or of cliques of ring_of_cliques.
      community_size: nodes per community or clique, or per bell of barbell; 0 divides all nodes
        evenly.
      p_in, p_out: planted_partition: probability of an edge within a community (p_in) and between
        two (p_out).
      neighbours: watts_strogatz: nodes that each node is joined to before rewiring, at least 2, of
        which an odd number counts as one less; 0 for a tenth of the nodes.
      rewire: watts_strogatz: probability that an edge moves to a random node.
      dims: sides of the grid.
      periodic: closes the grid to a torus.
      branching, height: balanced_tree: children per node (branching) and levels below the root
        (height).
      path_length: barbell: nodes between the bells.
      truncation: distance below which two signatures count as connected in the fit; separate from
        that of the kernels, `config.model.kernel.truncation`.
      steps: number of updates of the fit.
      learning_rate: learning rate of the fit.
      hinge: True fits which nodes are connected; False fits distances to the lengths of shortest
        paths.
    """

    graph: Annotated[str, key_of(lambda: ("none", "complete", *GENERATORS))] = "none"
    attachments: Size = 2
    edge_probability: Fraction = 0.1
    communities: Size = 8
    community_size: Count = 0
    p_in: Fraction = 0.9
    p_out: Fraction = 0.2
    neighbours: Annotated[int, Interval("0 or at least 2", 2, LARGEST_INT, other=0)] = 0
    rewire: Fraction = 0.4
    dims: Sizes = (16, 16)
    periodic: bool = False
    branching: Size = 2
    height: Count = 7
    path_length: Count = 0
    truncation: Annotated[float, Interval("in (0, 2)", SMALLEST, 2, open_high=True)] = 0.8
    steps: Count = 1000
    learning_rate: Positive = 1e-3
    hinge: bool = True

    @property
    def idle(self) -> dict[str, str]:
        """The fields that the graph does not read, and why."""
        own = {name for fields in FIELDS.values() for name in fields}
        if self.graph == "none":
            own |= {"truncation", "steps", "learning_rate", "hinge"}
        unread = own - set(FIELDS.get(self.graph, ()))
        return dict.fromkeys(sorted(unread), f"config.model.prior.graph={self.graph!r}")


def make_graph(config: PriorConfig, *, nodes: int, seed: int) -> Bool[np.ndarray, "T T"]:
    """Returns the adjacency matrix of the configured graph, symmetric and without self-loops.

    Nodes are in networkx's order, which keeps communities together.

    Raises:
      ValueError: if the graph cannot have `nodes` nodes; the message names sizes that fit.
    """
    if config.graph == "complete":
        return ~np.eye(nodes, dtype=bool)
    graph = GENERATORS[config.graph](config, nodes, seed)
    return nx.to_numpy_array(graph) > 0


def find_communities(
    config: PriorConfig, adjacency: Bool[np.ndarray, "T T"], *, seed: int
) -> Int[np.ndarray, " T"]:
    """Returns the community number of each node, by which plots order the nodes.

    These are the blocks or cliques that the graph was built from, or, for other graphs, communities
    found by the Louvain method, numbered by their first node.
    """
    nodes = len(adjacency)
    if config.graph in ("planted_partition", "ring_of_cliques"):
        # networkx numbers the nodes of a block or clique consecutively.
        return np.arange(nodes) // (config.community_size or nodes // config.communities)
    if config.graph == "complete":
        return np.zeros(nodes, int)
    groups = nx.community.louvain_communities(nx.from_numpy_array(adjacency), seed=seed)
    labels = np.zeros(nodes, int)
    for number, group in enumerate(sorted(groups, key=min)):
        labels[list(group)] = number
    return labels


def _barabasi_albert(config: PriorConfig, nodes: int, seed: int) -> nx.Graph:
    if config.attachments >= nodes:
        _refuse("attachments", config.attachments, nodes, f"must be below {nodes}")
    return nx.barabasi_albert_graph(nodes, config.attachments, seed=seed)


def _erdos_renyi(config: PriorConfig, nodes: int, seed: int) -> nx.Graph:
    return nx.erdos_renyi_graph(nodes, config.edge_probability, seed=seed)


def _watts_strogatz(config: PriorConfig, nodes: int, seed: int) -> nx.Graph:
    # In the original a tenth of fewer than 15 nodes is 0 or 1, and the graph has no edges.
    neighbours = config.neighbours or max(2, round(0.1 * nodes))
    if neighbours >= nodes:
        _refuse("neighbours", neighbours, nodes, f"must be below {nodes}")
    return nx.watts_strogatz_graph(nodes, neighbours, config.rewire, seed=seed)


def _community_size(config: PriorConfig, nodes: int, minimum: int) -> int:
    count, size = config.communities, config.community_size or nodes // config.communities
    if count < minimum or size < minimum or count * size != nodes:
        _refuse(
            "communities",
            count,
            nodes,
            f"x community_size={size} makes {count * size} nodes; choose two factors of {nodes}, "
            f"each at least {minimum}, or community_size=0 and communities from "
            f"{[n for n in range(minimum, nodes // minimum + 1) if nodes % n == 0]}",
        )
    return size


def _planted_partition(config: PriorConfig, nodes: int, seed: int) -> nx.Graph:
    size = _community_size(config, nodes, 1)
    return nx.planted_partition_graph(config.communities, size, config.p_in, config.p_out, seed)


def _ring_of_cliques(config: PriorConfig, nodes: int, seed: int) -> nx.Graph:
    del seed
    return nx.ring_of_cliques(config.communities, _community_size(config, nodes, 2))


def _grid(config: PriorConfig, nodes: int, seed: int) -> nx.Graph:
    del seed
    size = math.prod(config.dims)
    if size != nodes:
        # For the message: the squarest grid with the right number of nodes.
        side = max(n for n in range(1, math.isqrt(nodes) + 1) if nodes % n == 0)
        fits = f"makes {size} nodes; {(side, nodes // side)} would fit"
        _refuse("dims", config.dims, nodes, fits)
    return nx.grid_graph(config.dims, periodic=config.periodic)


def _balanced_tree(config: PriorConfig, nodes: int, seed: int) -> nx.Graph:
    del seed
    # Sizes by height, up to the configured one and until one is large enough: the message names the
    # two nearest.
    sizes = [1]
    while len(sizes) <= config.height or sizes[-1] < nodes:
        sizes.append(1 + config.branching * sizes[-1])
    size = sizes[config.height]
    if size != nodes:
        near = {max(s for s in sizes if s <= nodes), min(s for s in sizes if s >= nodes)}
        _refuse(
            "height",
            config.height,
            nodes,
            f"with branching={config.branching} makes {size} nodes; set config.model.mediators to "
            f"that, or choose a height that makes {' or '.join(map(str, sorted(near)))}",
        )
    return nx.balanced_tree(config.branching, config.height)


def _barbell(config: PriorConfig, nodes: int, seed: int) -> nx.Graph:
    del seed
    bell = config.community_size or (nodes - config.path_length) // 2
    size = 2 * bell + config.path_length
    if bell < 2 or size != nodes:
        _refuse(
            "community_size",
            config.community_size,
            nodes,
            f"makes 2 x {bell} + path_length={config.path_length} = {size} nodes; choose a path "
            f"that leaves an even number of at least 4 of the {nodes}, and community_size=0",
        )
    return nx.barbell_graph(bell, config.path_length)


def _hypercube(config: PriorConfig, nodes: int, seed: int) -> nx.Graph:
    del seed
    dims = nodes.bit_length() - 1
    if nodes != 2**dims:
        fits = f"has 2^d nodes, such as {2**dims} or {2 ** (dims + 1)}"
        _refuse("graph", config.graph, nodes, fits)
    return nx.hypercube_graph(dims)


def _refuse(field: str, value: object, nodes: int, fits: str) -> None:
    # networkx would build a graph of another size, or raise an error that names no config field.
    raise ValueError(
        f"config.model.prior.{field}={value!r} does not fit config.model.mediators={nodes}: {fits}"
    )


# By name: a function (config, nodes, seed) that returns a graph of that many nodes.
GENERATORS: types.MappingProxyType[str, Callable[[PriorConfig, int, int], nx.Graph]] = (
    types.MappingProxyType(
        {
            "watts_strogatz": _watts_strogatz,
            "planted_partition": _planted_partition,
            "grid": _grid,
            "balanced_tree": _balanced_tree,
            "barbell": _barbell,
            "erdos_renyi": _erdos_renyi,
            "barabasi_albert": _barabasi_albert,
            "ring_of_cliques": _ring_of_cliques,
            "hypercube": _hypercube,
        }
    )
)
# The fields that each of them reads.
FIELDS: types.MappingProxyType[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "watts_strogatz": ("neighbours", "rewire"),
        "planted_partition": ("communities", "community_size", "p_in", "p_out"),
        "grid": ("dims", "periodic"),
        "balanced_tree": ("branching", "height"),
        "barbell": ("community_size", "path_length"),
        "erdos_renyi": ("edge_probability",),
        "barabasi_albert": ("attachments",),
        "ring_of_cliques": ("communities", "community_size"),
        "hypercube": (),
    }
)
