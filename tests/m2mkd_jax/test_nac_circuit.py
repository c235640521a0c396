"""What a NAC's training starts from and depends on: initial signatures, regularisers by epoch, the
picture of the graph."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from etils import epath
from tiny import NAC, OPTIM

from m2mkd_jax import connectivity
from m2mkd_jax.config import Config
from m2mkd_jax.families import circuit
from m2mkd_jax.families.circuit import Circuit
from m2mkd_jax.nac.graphs import PriorConfig, make_graph

MODEL = dataclasses.replace(
    NAC, inputs=30, mediators=40, outputs=50, prior=PriorConfig("erdos_renyi", steps=2)
)


def config_of(*, optim=OPTIM, seed: int = 0, **changes) -> Config:
    model = dataclasses.replace(MODEL, **changes)
    return Config(phase="end_to_end", model=model, optim=optim, seed=seed)


def start_of(config):
    """The model and seed that a circuit starts from."""
    return config.model, config.seed


# Initial signatures.


def test_signatures_are_normal_and_distinct_by_set_and_seed():
    drawn = []
    for seed in (0, 1):
        signatures = circuit.draw_signatures(*start_of(config_of(seed=seed)))
        shapes = {name: array.shape for name, array in signatures.items()}
        assert shapes == {"input": (30, 8), "mediator": (40, 8), "output": (50, 8)}
        drawn += list(signatures.values())
    numbers = np.concatenate([array.ravel() for array in drawn])
    assert len(np.unique(numbers)) > 0.99 * numbers.size
    assert numbers.std() == pytest.approx(1, abs=0.05) and abs(numbers.mean()) < 0.1


def test_mediators_start_from_the_prior_and_the_others_are_drawn(tmp_path):
    config = config_of(seed=3)
    started = circuit.start_circuit(*start_of(config), epath.Path(tmp_path))
    drawn = circuit.draw_signatures(*start_of(config))
    for name in ("input", "output"):
        np.testing.assert_array_equal(started.signatures[name], drawn[name])
    np.testing.assert_array_equal(started.signatures["mediator"], started.prior.signatures)
    assert not np.any(started.signatures["mediator"] == drawn["mediator"])
    graph = make_graph(config.model.prior, nodes=40, seed=3)
    np.testing.assert_array_equal(started.prior.adjacency, graph)
    assert [path.name for path in tmp_path.iterdir()] == ["prior.npz"]


def test_all_signatures_are_drawn_without_a_prior(tmp_path):
    config = config_of(prior=PriorConfig())
    started = circuit.start_circuit(*start_of(config), epath.Path(tmp_path))
    assert started.prior is None and not list(tmp_path.iterdir())
    for name, array in circuit.draw_signatures(*start_of(config)).items():
        np.testing.assert_array_equal(started.signatures[name], array)


def test_a_complete_graph_connects_all_sets(tmp_path):
    config = config_of(prior=PriorConfig("complete"))
    started = circuit.start_circuit(*start_of(config), epath.Path(tmp_path))
    for name, count in (("input", 30), ("mediator", 40), ("output", 50)):
        np.testing.assert_array_equal(started.signatures[name], np.eye(1, 8).repeat(count, 0))


def test_mismatched_prior_is_refused_before_the_run():
    circuit.check_circuit(*start_of(config_of()))
    circuit.check_circuit(*start_of(config_of(prior=PriorConfig(communities=7))))  # has no graph
    with pytest.raises(ValueError, match=r"config\.model\.prior\.graph"):
        circuit.check_circuit(*start_of(config_of(prior=PriorConfig("hypercube"))))


# Regularisers.


@pytest.fixture
def asked(monkeypatch):
    """What the regulariser is constructed from and called with; it returns the progress."""
    calls = {}

    def make(config, signatures, *, kernels):
        calls.update(config=config, signatures=signatures, kernels=kernels)

        def regularize(params, progress):
            calls["params"] = params
            return progress, {}

        return regularize

    monkeypatch.setattr(circuit, "make_regularizer", make)
    return calls


START = Circuit({"mediator": np.zeros((40, 8))}, None)


@pytest.mark.parametrize(
    ("steps", "per_epoch", "progress"),
    [
        (12, 4, {0: 0, 3: 0, 4: 1 / 3, 7: 1 / 3, 8: 2 / 3, 11: 2 / 3}),
        (10, 2, {1: 0, 2: 1 / 5, 9: 4 / 5}),
        (3, 8, {0: 0, 2: 0}),
    ],
)
def test_progress_is_the_fraction_of_epochs_completed(asked, steps, per_epoch, progress):
    config = config_of(optim=dataclasses.replace(OPTIM, steps=steps))
    regularizer = circuit.circuit_regularizer(
        config.model, START, config.regularizers, config.optim, per_epoch
    )
    params = {"student": {"graph": 1}}
    found = {step: regularizer(params, step)[0] for step in progress}
    assert found == pytest.approx(progress)
    assert asked["params"] == {"graph": 1}


def test_regularisers_see_each_iterations_kernel(asked):
    truncation = {"kernel/truncation": (0.5, None, 1.1)}
    config = config_of(iterations=3, layerwise=truncation)
    circuit.circuit_regularizer(config.model, START, config.regularizers, config.optim, 1)
    assert [kernel.truncation for kernel in asked["kernels"]] == [0.5, None, 1.1]
    assert asked["signatures"] is START.signatures
    assert asked["config"] is config.regularizers


# The picture.


@pytest.fixture
def drawing(monkeypatch, tmp_path):
    """Draws the circuit of a config; returns what was loaded and drawn."""
    calls = {}

    def load(workdir, *, subtree, average):
        calls.update(workdir=workdir, subtree=subtree, average=average)
        return {"signatures": np.ones((40, 8))}

    def draw(before, after, groups, *, truncation, path):
        calls.update(before=before, after=after, groups=groups, truncation=truncation, path=path)

    monkeypatch.setattr(circuit.checkpoint, "load", load)
    monkeypatch.setattr(connectivity, "draw_connectivity", draw)

    def run(config, start=START):
        circuit.draw_circuit(config.model, start, epath.Path(tmp_path))
        return calls

    return run


def test_picture_shows_mediators_before_and_after_training(drawing, tmp_path):
    calls = drawing(config_of())
    assert calls["subtree"] == "student/graph/mediator" and calls["workdir"] == tmp_path
    assert calls["before"] is START.signatures["mediator"]
    np.testing.assert_array_equal(calls["after"], np.ones((40, 8)))
    np.testing.assert_array_equal(calls["groups"], np.zeros(40, int))
    assert calls["truncation"] == MODEL.kernel.truncation == 0.9
    assert calls["path"] == tmp_path / "connectivity.png"


def test_picture_uses_ema_if_present(drawing):
    assert drawing(config_of())["average"] is True


def test_without_truncation_all_are_connected(drawing):
    kernel = dataclasses.replace(MODEL.kernel, truncation=None)
    assert drawing(config_of(kernel=kernel))["truncation"] == 2.0


def test_mediators_are_ordered_by_the_priors_communities(drawing, tmp_path):
    start = circuit.start_circuit(*start_of(config_of()), epath.Path(tmp_path) / "run")
    assert drawing(config_of(), start)["groups"] is start.prior.communities


def test_failed_picture_only_warns(drawing, monkeypatch, caplog):
    def fail(*arguments, **settings):
        raise OSError("no space left")

    monkeypatch.setattr(circuit.checkpoint, "load", fail)
    with caplog.at_level(logging.WARNING):
        assert drawing(config_of()) == {}
    assert "connectivity.png" in caplog.text and "no space left" in caplog.text


def test_existing_picture_is_kept(drawing, monkeypatch):
    monkeypatch.setattr(circuit, "is_picture", lambda path: True)
    assert drawing(config_of()) == {}


def test_only_one_process_draws(drawing, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert drawing(config_of()) == {}
