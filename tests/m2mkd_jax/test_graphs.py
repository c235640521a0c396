"""The graphs of priors, and their communities."""

import numpy as np
import pytest
from graph_priors import FITTING, NODES, config_of

from m2mkd_jax.nac import graphs
from m2mkd_jax.nac.graphs import PriorConfig


def test_every_graph_is_tested():
    assert set(FITTING) == set(graphs.GENERATORS)


def graph_of(graph, nodes=NODES, seed=0, **changes):
    return graphs.make_graph(config_of(graph, **changes), nodes=nodes, seed=seed)


OTHERS = ~np.eye(NODES, dtype=bool)
BLOCKS = np.kron(np.eye(4), np.ones((4, 4))).astype(bool)


def test_random_graphs_match_their_edge_probabilities():
    np.testing.assert_array_equal(
        graph_of("planted_partition", p_in=1.0, p_out=0.0), BLOCKS & OTHERS
    )
    np.testing.assert_array_equal(graph_of("planted_partition", p_in=0.0, p_out=1.0), ~BLOCKS)
    assert not graph_of("erdos_renyi", edge_probability=0.0).any()
    np.testing.assert_array_equal(graph_of("erdos_renyi", edge_probability=1.0), OTHERS)
    share = graph_of("erdos_renyi", nodes=100, edge_probability=0.3).mean()
    assert share == pytest.approx(0.3 * 0.99, abs=0.03)


def test_barabasi_albert_nodes_bring_their_attachments():
    for attachments in (1, 2, 3):
        adjacency = graph_of("barabasi_albert", attachments=attachments)
        assert adjacency.sum() / 2 == attachments * (NODES - attachments)
        assert adjacency[attachments + 1 :].sum(1).min() == attachments


def ring(nodes, reach):
    """Who is at most `reach` places apart on a circle."""
    apart = np.abs(np.arange(nodes)[:, None] - np.arange(nodes))
    apart = np.minimum(apart, nodes - apart)
    return (apart > 0) & (apart <= reach)


def test_watts_strogatz_is_a_ring_with_rewired_edges():
    np.testing.assert_array_equal(graph_of("watts_strogatz", rewire=0.0), ring(NODES, 2))
    tenth = graph_of("watts_strogatz", nodes=38, neighbours=0, rewire=0.0)  # 3.8, rounded to 4
    np.testing.assert_array_equal(tenth, ring(38, 2))
    few = graph_of("watts_strogatz", nodes=8, neighbours=0, rewire=0.0)  # 0.8, but at least 2
    np.testing.assert_array_equal(few, ring(8, 1))
    moved = graph_of("watts_strogatz", rewire=1.0)
    assert moved.sum() == 4 * NODES
    assert np.sum(moved & ring(NODES, 2)) < 2.5 * NODES


def test_grid_has_given_sides_and_is_a_torus_if_periodic():
    degrees = graph_of("grid", dims=(2, 8)).sum(0)
    assert sorted(degrees) == [2] * 4 + [3] * 12
    assert set(graph_of("grid", dims=(4, 4), periodic=True).sum(0)) == {4}
    np.testing.assert_array_equal(graph_of("grid", dims=(NODES,)), ring(NODES + 1, 1)[:-1, :-1])


@pytest.mark.parametrize(("branching", "height", "nodes"), [(2, 3, 15), (3, 2, 13), (1, 4, 5)])
def test_balanced_tree_has_given_branching_and_height(branching, height, nodes):
    adjacency = graph_of("balanced_tree", nodes=nodes, branching=branching, height=height)
    parents = {(i, (i - 1) // branching) for i in range(1, nodes)}
    assert {(t, s) for t, s in np.argwhere(adjacency).tolist() if t > s} == parents


def test_barbell_is_two_cliques_and_a_path():
    adjacency = graph_of("barbell", path_length=2)
    edges = {(t, s) for t, s in np.argwhere(np.triu(adjacency)).tolist()}
    bells = {(t, s) for b in (range(7), range(9, 16)) for t in b for s in b if t < s}
    assert edges == bells | {(6, 7), (7, 8), (8, 9)}


def test_ring_of_cliques_joins_cliques_in_a_ring():
    adjacency = graph_of("ring_of_cliques")
    assert adjacency[BLOCKS & OTHERS].all()
    between = adjacency.reshape(4, 4, 4, 4).sum((1, 3)) * (1 - np.eye(4))
    np.testing.assert_array_equal(between, ring(4, 1))


def test_hypercube_neighbours_differ_in_one_bit():
    adjacency = graph_of("hypercube")
    apart = np.array([[(t ^ s).bit_count() for s in range(NODES)] for t in range(NODES)])
    np.testing.assert_array_equal(adjacency, apart == 1)


@pytest.mark.parametrize(
    "graph", ["watts_strogatz", "planted_partition", "erdos_renyi", "barabasi_albert"]
)
def test_every_random_graph_depends_on_seed(graph):
    assert np.any(graph_of(graph, seed=1) != graph_of(graph, seed=2))


def test_communities_have_the_given_size():
    config = config_of("ring_of_cliques", communities=2, community_size=8)
    adjacency = graphs.make_graph(config, nodes=NODES, seed=0)
    found = graphs.find_communities(config, adjacency, seed=0)
    np.testing.assert_array_equal(found, np.repeat([0, 1], 8))
    complete = PriorConfig("complete")
    np.testing.assert_array_equal(
        graphs.find_communities(complete, OTHERS, seed=0), np.zeros(NODES)
    )


def test_communities_are_planted_blocks_or_detected():
    planted = graphs.find_communities(
        config_of("planted_partition"), np.zeros((NODES, NODES), bool), seed=0
    )
    np.testing.assert_array_equal(planted, np.repeat(range(4), 4))
    bells = config_of("barbell")
    found = graphs.find_communities(bells, graphs.make_graph(bells, nodes=NODES, seed=0), seed=0)
    assert found[0] == 0 and len(set(found[:7])) == len(set(found[-7:])) == 1
    assert found[0] != found[-1]
