"""The fit of signatures to graph priors, and what is cached."""

import dataclasses
import logging

import jax
import networkx as nx
import numpy as np
import pytest
from etils import epath
from graph_priors import FITTING, NODES, config_of

from m2mkd_jax.nac import graphs, priors
from m2mkd_jax.nac.graphs import PriorConfig

WIDTH = 12


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


@pytest.mark.parametrize("graph", FITTING)
def test_graph_is_built_and_fitted(graph):
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


def test_random_graph_is_reproducible_from_seed():
    config = config_of("erdos_renyi")
    first, again, other = (graphs.make_graph(config, nodes=NODES, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_no_graph_gives_no_prior():
    assert prepare(PriorConfig()) is None


def test_complete_graph_gives_identical_signatures():
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
def test_invalid_size_suggests_valid_ones(graph, changes, nodes, said):
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
        ({"neighbours": 1}, "^neighbours=1 must be 0 or at least 2"),
        ({"dims": ()}, "dims"),
        ({"truncation": 2.0}, "truncation=2.0"),
        ({"learning_rate": 0.0}, "positive"),
    ],
)
def test_invalid_value_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        PriorConfig(**changes)


def test_the_defaults_are_the_published_ones():
    assert PriorConfig() == PriorConfig(
        graph="none",
        attachments=2,
        edge_probability=0.1,
        communities=8,
        community_size=0,
        p_in=0.9,
        p_out=0.2,
        neighbours=0,
        rewire=0.4,
        periodic=False,
        truncation=0.8,
        steps=1000,
        learning_rate=1e-3,
        hinge=True,
    )


def test_init_is_orthonormal():
    tall, wide = (
        np.asarray(priors.draw_signatures(jax.random.key(0), nodes=n, width=WIDTH))
        for n in (NODES, 8)
    )
    np.testing.assert_allclose(tall.T @ tall, np.eye(WIDTH), atol=1e-5)
    np.testing.assert_allclose(wide @ wide.T, np.eye(8), atol=1e-5)


def test_fit_returns_the_loss_after_each_update():
    config = config_of("ring_of_cliques", steps=3)
    adjacency = graphs.make_graph(config, nodes=NODES, seed=0)
    init = priors.draw_signatures(jax.random.key(1), nodes=NODES, width=WIDTH)
    signatures, losses = priors.fit_signatures(adjacency, init, config)
    assert losses.shape == (4,)
    np.testing.assert_allclose(losses[0], naive_loss(init, adjacency, 0.8), rtol=1e-5)
    np.testing.assert_allclose(losses[3], naive_loss(signatures, adjacency, 0.8), rtol=1e-5)
    # Adam's first step changes every number by the learning rate, whatever the gradient.
    one, _ = priors.fit_signatures(adjacency, init, dataclasses.replace(config, steps=1))
    np.testing.assert_allclose(np.abs(one - init), config.learning_rate, rtol=0.02)


def hinge_gradient(signatures, adjacency, truncation):
    """The gradient of `naive_loss`, by hand."""
    length = np.linalg.norm(signatures, axis=1, keepdims=True)
    unit = signatures / length
    distance = 1 - unit @ unit.T
    by_distance = np.where(adjacency, distance > truncation, -1.0 * (distance < truncation))
    by_unit = -(by_distance + by_distance.T) @ unit / len(adjacency) ** 2
    return (by_unit - unit * np.sum(by_unit * unit, axis=1, keepdims=True)) / length


def test_fit_matches_adam():
    config = config_of("ring_of_cliques", steps=6, learning_rate=0.05, truncation=0.7)
    adjacency = graphs.make_graph(config, nodes=NODES, seed=0)
    init = np.random.default_rng(0).normal(size=(NODES, WIDTH)).astype(np.float32)
    want, first, second = init.astype(float), 0.0, 0.0
    for step in range(1, 7):
        gradient = hinge_gradient(want, adjacency, 0.7)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        root = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        want = want - 0.05 * first / (1 - 0.9**step) / root
    signatures, _ = priors.fit_signatures(adjacency, init, config)
    np.testing.assert_allclose(signatures, want, atol=2e-3)


def test_distances_are_fitted_to_path_lengths():
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


def test_disconnected_nodes_have_path_length_0():
    adjacency = np.zeros((4, 4), bool)
    assert not priors.scaled_paths(adjacency).any()
    adjacency[0, 1] = adjacency[1, 0] = True
    np.testing.assert_array_equal(priors.scaled_paths(adjacency), adjacency)


def test_count_errors_by_hand():
    # Latents 0 and 1 are close; 2 is at a right angle.
    signatures = np.array([[1, 0], [1, 0.1], [0, 1]], np.float32)
    adjacency = np.zeros((3, 3), bool)
    adjacency[0, 2] = adjacency[2, 0] = True
    assert priors.count_errors(signatures, adjacency, 0.5) == (1, 1)
    assert priors.disagreement(signatures, adjacency, 0.5) == pytest.approx(4 / 9)


@pytest.fixture
def made(monkeypatch):
    """Counts how often a prior is computed."""
    calls, make = [], priors._make

    def counting(*arguments):
        calls.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(priors, "_make", counting)
    return calls


def test_prior_is_computed_once(made, tmp_path, caplog):
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


def test_prior_is_recomputed_for_other_settings(made, tmp_path):
    config, folder = config_of("barabasi_albert", steps=20), epath.Path(tmp_path)
    first = prepare(config, cache=folder)
    other = prepare(config, seed=1, cache=folder)
    assert (first.signatures != other.signatures).any()
    prepare(dataclasses.replace(config, truncation=0.7), seed=1, cache=folder)
    assert len(made) == 3


# For a ring of cliques; a field that the graph does not use still counts.
CHANGED = {
    "graph": "hypercube",
    "attachments": 3,
    "edge_probability": 0.3,
    "communities": 2,
    "community_size": 4,
    "p_in": 0.8,
    "p_out": 0.1,
    "neighbours": 2,
    "rewire": 0.5,
    "dims": (4, 4),
    "periodic": True,
    "branching": 3,
    "height": 2,
    "path_length": 1,
    "truncation": 0.7,
    "steps": 1,
    "learning_rate": 0.1,
    "hinge": False,
}


def test_prior_is_recomputed_if_any_setting_changes(monkeypatch, tmp_path):
    assert set(CHANGED) == {field.name for field in dataclasses.fields(PriorConfig)}
    made = []

    def make(config, nodes, width, seed):
        made.append((config, nodes, width, seed))
        numbers = dict.fromkeys(("edges", "missed", "spurious"), 0)
        signatures = np.zeros((nodes, width), np.float32)
        square, row = np.zeros((nodes, nodes), bool), np.zeros(nodes, int)
        return priors.Prior(square, row, signatures, disagreement=0.0, **numbers)

    monkeypatch.setattr(priors, "_make", make)
    config, folder = config_of("ring_of_cliques"), epath.Path(tmp_path)
    sizes = {"nodes": NODES, "signature_width": WIDTH, "seed": 0}
    others = [(dataclasses.replace(config, **{k: v}), sizes) for k, v in CHANGED.items()]
    others += [(config, sizes | {name: value + 4}) for name, value in sizes.items()]
    for changed, given in others:
        made.clear()
        for one, own in ((config, sizes), (changed, given), (changed, given)):
            priors.prepare_prior(one, cache=folder, **own)
        assert made == [(config, *sizes.values()), (changed, *given.values())], (changed, given)


def test_prior_errors_use_its_truncation():
    prior = prepare(config_of("ring_of_cliques", steps=0, truncation=0.5))
    signatures, adjacency = prior.signatures, prior.adjacency
    errors = priors.count_errors(signatures, adjacency, 0.5)
    assert (prior.missed, prior.spurious) == errors != (0, 0)
    assert prior.disagreement == priors.disagreement(signatures, adjacency, 0.5)


def test_only_one_process_writes_the_prior(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert prepare(PriorConfig("complete"), cache=epath.Path(tmp_path)) is not None
    assert not list(tmp_path.iterdir())


def test_seed_sets_graph_and_signatures():
    config = config_of("erdos_renyi", steps=0)
    one, two = (prepare(config, seed=seed) for seed in (1, 2))
    for prior, seed in ((one, 1), (two, 2)):
        graph = graphs.make_graph(config, nodes=NODES, seed=seed)
        np.testing.assert_array_equal(prior.adjacency, graph)
        init = priors.draw_signatures(jax.random.key(seed), nodes=NODES, width=WIDTH)
        np.testing.assert_array_equal(prior.signatures, init)
    assert not np.any(one.signatures == two.signatures)


@pytest.mark.parametrize("kept", [0, 100, -30])
def test_truncated_prior_file_is_recomputed(made, tmp_path, caplog, kept):
    config, folder = config_of("barabasi_albert", steps=20), epath.Path(tmp_path)
    first = prepare(config, cache=folder)
    file = folder / priors.FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    again = prepare(config, cache=folder)
    assert len(made) == 2 and str(file) in caplog.text
    np.testing.assert_array_equal(first.signatures, again.signatures)
    assert prepare(config, cache=folder).edges == first.edges and len(made) == 2
