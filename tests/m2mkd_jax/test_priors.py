"""Graph priors: every graph, the fit, and what is kept of it."""

import dataclasses
import logging

import jax
import networkx as nx
import numpy as np
import pytest
from etils import epath

from m2mkd_jax.models.nac import graphs, priors
from m2mkd_jax.models.nac.graphs import PriorConfig

NODES, WIDTH = 16, 12
# A config of every graph that has 16 nodes, but the tree with 15.
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


def nodes_of(graph):
    return 15 if graph == "balanced_tree" else NODES


def prepare(config, nodes=NODES, seed=0, cache=None):
    return priors.prepare_prior(config, nodes=nodes, signature_width=WIDTH, seed=seed, cache=cache)


def naive_loss(signatures, adjacency, truncation):
    signatures = np.asarray(signatures, np.float64)
    unit = signatures / np.linalg.norm(signatures, axis=1, keepdims=True)
    total, nodes = 0.0, len(adjacency)
    for t in range(nodes):
        for s in range(nodes):
            distance = 1 - unit[t] @ unit[s]
            joined = adjacency[t, s]
            total += max(truncation, distance) if joined else max(-truncation, -distance)
    return total / nodes**2


def test_every_graph_is_tried():
    assert set(FITTING) == set(graphs.GENERATORS)


@pytest.mark.parametrize("graph", FITTING)
def test_graph_is_built_and_reached(graph):
    nodes = nodes_of(graph)
    prior = prepare(config_of(graph), nodes)
    adjacency = prior.adjacency
    assert adjacency.shape == (nodes, nodes) and adjacency.dtype == bool
    np.testing.assert_array_equal(adjacency, adjacency.T)
    assert not adjacency.diagonal().any()
    assert prior.edges == adjacency.sum() / 2 > 0
    assert prior.disagreement < 0.02
    assert (prior.missed + prior.spurious) * 2 / nodes**2 == pytest.approx(prior.disagreement)
    assert prior.communities.shape == (nodes,)


def test_a_drawn_graph_follows_its_seed():
    config = config_of("erdos_renyi")
    first, again, other = (graphs.make_graph(config, nodes=NODES, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_no_graph_leaves_signatures_alone():
    assert prepare(PriorConfig()) is None


def test_complete_graph_makes_all_alike():
    prior = prepare(PriorConfig(graph="complete"))
    np.testing.assert_array_equal(prior.signatures, np.eye(1, WIDTH).repeat(NODES, 0))
    assert (prior.edges, prior.missed, prior.spurious) == (NODES * (NODES - 1) // 2, 0, 0)
    assert prior.disagreement == 0


@pytest.mark.parametrize(
    ("graph", "changes", "nodes", "said"),
    [
        ("planted_partition", {"communities": 5}, 16, "[1, 2, 4, 8, 16]"),
        ("ring_of_cliques", {"communities": 4, "community_size": 5}, 16, "20 nodes"),
        ("grid", {"dims": (3, 5)}, 12, "(3, 4) would fit"),
        ("balanced_tree", {"height": 3}, 16, "15 or 31"),
        ("barbell", {"path_length": 0}, 15, "14 nodes"),
        ("hypercube", {}, 100, "64 or 128"),
        ("barabasi_albert", {"attachments": 16}, 16, "below 16"),
        ("watts_strogatz", {"neighbours": 16}, 16, "below 16"),
    ],
)
def test_a_size_that_does_not_fit_says_what_does(graph, changes, nodes, said):
    with pytest.raises(ValueError, match=r"config\.model\.prior\.\w+=.*mediators") as raised:
        graphs.make_graph(config_of(graph, **changes), nodes=nodes, seed=0)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"graph": "barabasi-albert"}, "did you mean 'barabasi_albert'"),
        ({"graph": "scale_free"}, "'barabasi_albert'"),
        ({"p_in": 1.5}, r"^p_in=1.5 .*\[0, 1\]"),
        ({"attachments": 0}, "at least 1"),
        ({"dims": ()}, "dims"),
        ({"truncation": 2.0}, "truncation=2.0"),
        ({"learning_rate": 0.0}, "positive"),
    ],
)
def test_a_wrong_value_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        PriorConfig(**changes)


def test_communities_are_the_blocks_or_are_found():
    planted = graphs.find_communities(
        config_of("planted_partition"), np.zeros((NODES, NODES), bool), seed=0
    )
    np.testing.assert_array_equal(planted, np.repeat(range(4), 4))
    bells = config_of("barbell")
    found = graphs.find_communities(bells, graphs.make_graph(bells, nodes=NODES, seed=0), seed=0)
    assert found[0] == 0 and len(set(found[:7])) == len(set(found[-7:])) == 1
    assert found[0] != found[-1]


def test_init_is_orthonormal():
    tall, wide = (
        np.asarray(priors.draw_signatures(jax.random.key(0), nodes=n, width=WIDTH))
        for n in (NODES, 8)
    )
    np.testing.assert_allclose(tall.T @ tall, np.eye(WIDTH), atol=1e-5)
    np.testing.assert_allclose(wide @ wide.T, np.eye(8), atol=1e-5)


def test_losses_are_those_after_each_update():
    config = config_of("ring_of_cliques", steps=3)
    adjacency = graphs.make_graph(config, nodes=NODES, seed=0)
    init = priors.draw_signatures(jax.random.key(1), nodes=NODES, width=WIDTH)
    signatures, losses = priors.fit_signatures(adjacency, init, config)
    assert losses.shape == (4,)
    np.testing.assert_allclose(losses[0], naive_loss(init, adjacency, 0.8), rtol=1e-5)
    np.testing.assert_allclose(losses[3], naive_loss(signatures, adjacency, 0.8), rtol=1e-5)
    # Adam's first step moves every number by the learning rate, whatever the gradient.
    one, _ = priors.fit_signatures(adjacency, init, dataclasses.replace(config, steps=1))
    np.testing.assert_allclose(np.abs(one - init), config.learning_rate, rtol=0.02)


def test_distances_are_fitted_to_paths():
    config = config_of("ring_of_cliques", hinge=False, steps=500)
    adjacency = graphs.make_graph(config, nodes=NODES, seed=0)
    graph = nx.from_numpy_array(adjacency)
    lengths = np.array([[nx.shortest_path_length(graph, t, s) for s in graph] for t in graph])
    target = priors.scaled_paths(adjacency)
    np.testing.assert_allclose(target, lengths / lengths.max(), rtol=1e-6)
    prior = prepare(config)
    unit = prior.signatures / np.linalg.norm(prior.signatures, axis=1, keepdims=True)
    assert prior.disagreement == pytest.approx(np.mean((1 - unit @ unit.T - target) ** 2), 1e-4)
    assert prior.disagreement < 0.05


def test_nodes_without_a_path_are_at_length_0():
    adjacency = np.zeros((4, 4), bool)
    assert not priors.scaled_paths(adjacency).any()
    adjacency[0, 1] = adjacency[1, 0] = True
    np.testing.assert_array_equal(priors.scaled_paths(adjacency), adjacency)


def test_errors_and_density_are_counted():
    # Latents 0 and 1 are near, 2 is at a right angle.
    signatures = np.array([[1, 0], [1, 0.1], [0, 1]], np.float32)
    adjacency = np.zeros((3, 3), bool)
    adjacency[0, 2] = adjacency[2, 0] = True
    assert priors.count_errors(signatures, adjacency, 0.5) == (1, 1)
    assert priors.disagreement(signatures, adjacency, 0.5) == pytest.approx(4 / 9)
    assert priors.density(signatures, 0.5) == pytest.approx(5 / 9)


@pytest.fixture
def made(monkeypatch):
    """Counts how often a prior is made."""
    calls, make = [], priors._make

    def counting(*arguments):
        calls.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(priors, "_make", counting)
    return calls


def test_a_prior_is_made_once(made, tmp_path, caplog):
    folder = epath.Path(tmp_path) / "run"
    config = config_of("barabasi_albert", steps=20)
    with caplog.at_level(logging.INFO):
        first = prepare(config, cache=folder)
        again = prepare(config, cache=folder)
    assert len(made) == 1
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    assert type(again.edges) is int and type(again.disagreement) is float
    said = [record.getMessage() for record in caplog.records]
    assert sum(f"barabasi_albert: 16 nodes, {first.edges} edges" in line for line in said) == 2
    assert [path.name for path in folder.iterdir()] == [priors.FILE]


def test_a_prior_of_other_settings_is_made_anew(made, tmp_path):
    config, folder = config_of("barabasi_albert", steps=20), epath.Path(tmp_path)
    first = prepare(config, cache=folder)
    other = prepare(config, seed=1, cache=folder)
    assert (first.signatures != other.signatures).any()
    prepare(dataclasses.replace(config, truncation=0.7), seed=1, cache=folder)
    assert len(made) == 3


@pytest.mark.parametrize("kept", [0, 100, -30])
def test_a_truncated_file_is_made_anew(made, tmp_path, caplog, kept):
    config, folder = config_of("barabasi_albert", steps=20), epath.Path(tmp_path)
    first = prepare(config, cache=folder)
    file = folder / priors.FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    again = prepare(config, cache=folder)
    assert len(made) == 2 and str(file) in caplog.text
    np.testing.assert_array_equal(first.signatures, again.signatures)
    assert prepare(config, cache=folder).edges == first.edges and len(made) == 2
