"""A config of each graph prior, for several test files."""

from m2mkd_jax.nac.graphs import PriorConfig

NODES = 16
# Configs of every graph with 16 nodes, except the tree, which has 15.
FITTING = {
    "watts_strogatz": {"neighbours": 4},
    "planted_partition": {"communities": 4},
    "grid": {"dims": (2, 8)},
    "balanced_tree": {"height": 3},
    "barbell": {"path_length": 2},
    "erdos_renyi": {"edge_probability": 0.2},
    "barabasi_albert": {},
    "ring_of_cliques": {"communities": 4},
    "hypercube": {},
}


def config_of(graph, **changes):
    return PriorConfig(graph=graph, **{**FITTING.get(graph, {}), **changes})
