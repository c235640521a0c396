"""What a whole NAC needs besides its network: initial signatures, the schedule of a regularizer's
weight over the epochs, the picture."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from processes import finish_pair
from tiny import NAC, tiny_config

from common_jax import checkpoint
from common_jax.optim import OptimConfig
from common_jax.report import is_picture
from common_jax.state import fold_name
from m2mkd_jax import connectivity
from m2mkd_jax.families import circuit
from m2mkd_jax.families.circuit import (
    PICTURE,
    Circuit,
    check_circuit,
    circuit_regularizer,
    draw_circuit,
    draw_signatures,
    start_circuit,
)
from m2mkd_jax.nac.graphs import PriorConfig
from m2mkd_jax.nac.kernel import KernelConfig
from m2mkd_jax.nac.priors import Prior
from m2mkd_jax.regularizers import HingeConfig, RegularizersConfig

FREE = dataclasses.replace(NAC, prior=PriorConfig("none"), mediators=256, signature_width=64)


def config_of(model=NAC, **changes):
    return dataclasses.replace(tiny_config("end_to_end"), model=model, **changes)


def start_of(config):
    """The model and seed that a circuit starts from."""
    return config.model, config.seed


def test_draw_signatures_folds_set_name_into_seed():
    signatures = draw_signatures(*start_of(config_of(FREE, seed=3)))
    counts = {"input": FREE.inputs, "mediator": 256, "output": FREE.outputs}
    for name, count in counts.items():
        key = fold_name(jax.random.key(3), f"{name} signatures")
        want = jax.random.normal(key, (count, 64))
        np.testing.assert_array_equal(signatures[name], want)
    mediators = signatures["mediator"]
    assert np.mean(mediators) == pytest.approx(0, abs=0.03)
    assert np.std(mediators) == pytest.approx(1, abs=0.03)
    assert np.all(signatures["input"][:2] != signatures["output"][:2])
    other = draw_signatures(*start_of(config_of(FREE, seed=4)))
    assert all(np.all(other[name] != signatures[name]) for name in counts)


def test_start_circuit_without_prior_draws_signatures(tmp_path):
    config = config_of(FREE)
    started, drawn = start_circuit(*start_of(config), tmp_path), draw_signatures(*start_of(config))
    assert started.prior is None and not list(tmp_path.iterdir())
    assert started.signatures.keys() == drawn.keys()
    for name, signatures in drawn.items():
        np.testing.assert_array_equal(started.signatures[name], signatures)


def test_only_mediators_start_from_prior(monkeypatch, tmp_path):
    fitted, given = np.full((8, 8), 0.5, np.float32), []

    def prepare(*arguments, **settings):
        given.append((arguments, settings))
        return Prior(np.eye(8, dtype=bool), np.arange(8) // 4, fitted, 0.0, 0, 0, 0)

    monkeypatch.setattr(circuit, "prepare_prior", prepare)
    config = config_of(seed=6)
    started, drawn = start_circuit(*start_of(config), tmp_path), draw_signatures(*start_of(config))
    assert started.signatures["mediator"] is fitted is started.prior.signatures
    for name in ("input", "output"):
        np.testing.assert_array_equal(started.signatures[name], drawn[name])
    settings = {"nodes": 8, "signature_width": 8, "seed": 6, "cache": tmp_path}
    assert given == [((NAC.prior,), settings)]


def test_complete_graph_gives_identical_signatures(tmp_path):
    complete = dataclasses.replace(NAC, prior=PriorConfig("complete"))
    started = start_circuit(*start_of(config_of(complete)), tmp_path)
    first = [1.0] + [0.0] * (NAC.signature_width - 1)
    for name, count in (("input", 4), ("mediator", 8), ("output", 2)):
        np.testing.assert_array_equal(started.signatures[name], [first] * count)


def test_check_circuit_refuses_mismatched_graph():
    odd = dataclasses.replace(NAC, prior=PriorConfig("grid", dims=(3, 3)))
    with pytest.raises(ValueError, match=r"config\.model\.prior\.dims"):
        check_circuit(*start_of(config_of(odd)))
    assert (
        check_circuit(*start_of(config_of(FREE))) is None
        and check_circuit(*start_of(config_of())) is None
    )


def params_of(signatures):
    return {
        "student": {"graph": {n: {"signatures": jnp.asarray(s)} for n, s in signatures.items()}},
        "teacher": {},
    }


@pytest.mark.parametrize(
    ("optim", "epochs"),
    [
        (OptimConfig(steps=20), 4),
        (OptimConfig(steps=23), 4),  # the last three steps belong to no whole epoch
        (OptimConfig(epochs=4), 4),
        (OptimConfig(steps=3), 1),
    ],
)
def test_regularizer_weight_changes_per_epoch(optim, epochs):
    """(1 - p) 2 + p 6, where p is the fraction of epochs that are over."""
    terms = RegularizersConfig(hinge=HingeConfig(weight=2.0, weight_end=6.0, hinge=1.5))
    config = config_of(regularizers=terms, optim=optim)
    signatures = draw_signatures(*start_of(config))
    regularizer = circuit_regularizer(
        config.model, Circuit(signatures, None), config.regularizers, config.optim, 5
    )
    params = params_of(signatures)
    for step in range(optim.total_steps(5)):
        total, metrics = regularizer(params, jnp.int32(step))
        done = (step // 5) / epochs
        weight = float(total / metrics["regularizer/hinge"])
        assert weight == pytest.approx((1 - done) * 2 + done * 6, rel=1e-5), step


def test_each_iteration_has_its_own_kernel(monkeypatch):
    given = []
    monkeypatch.setattr(circuit, "make_regularizer", lambda *args, **named: given.append(named))
    layered = dataclasses.replace(NAC, iterations=2, layerwise={"kernel/truncation": (0.4, 0.7)})
    config = config_of(layered)
    circuit_regularizer(
        config.model,
        Circuit(draw_signatures(*start_of(config)), None),
        config.regularizers,
        config.optim,
        5,
    )
    assert [kernel.truncation for kernel in given[0]["kernels"]] == [0.4, 0.7]


class Drawn:
    """Stands in for the drawing function, and keeps its arguments."""

    def __init__(self, monkeypatch, learned):
        self.calls, self.loaded = [], []
        monkeypatch.setattr(connectivity, "draw_connectivity", self._draw)
        monkeypatch.setattr(checkpoint, "load", self._load)
        self.learned = learned

    def _draw(self, before, after, communities, **settings):
        self.calls.append((before, after, communities, settings))

    def _load(self, workdir, **settings):
        self.loaded.append(settings)
        return {"signatures": self.learned}


def test_picture_shows_initial_and_learned_signatures(monkeypatch, tmp_path):
    before, learned = np.random.default_rng(0).normal(size=(2, 8, 8))
    drawn = Drawn(monkeypatch, learned)
    communities = np.arange(8) % 3
    prior = Prior(np.eye(8, dtype=bool), communities, before, 0.0, 0, 0, 0)
    draw_circuit(NAC, Circuit({"mediator": before}, prior), tmp_path)
    ((start, after, groups, settings),) = drawn.calls
    assert start is before and groups is communities
    np.testing.assert_array_equal(after, learned)
    assert settings == {"truncation": 0.9, "path": tmp_path / "connectivity.png"}
    assert drawn.loaded == [{"subtree": "student/graph/mediator", "average": True}]


def test_picture_without_prior_or_truncation(monkeypatch, tmp_path):
    before = np.ones((8, 8))
    drawn = Drawn(monkeypatch, before)
    model = dataclasses.replace(FREE, kernel=KernelConfig(truncation=None))
    draw_circuit(model, Circuit({"mediator": before}, None), tmp_path)
    ((_, _, groups, settings),) = drawn.calls
    assert not np.any(groups) and len(groups) == 8
    assert settings["truncation"] == 2.0  # the largest possible distance: all are connected


def test_existing_picture_is_kept(monkeypatch, tmp_path):
    drawn = Drawn(monkeypatch, np.ones((8, 8)))
    started = Circuit({"mediator": np.ones((8, 8))}, None)
    monkeypatch.setattr(circuit, "is_picture", lambda path: path.name == "connectivity.png")
    draw_circuit(NAC, started, tmp_path)
    assert not drawn.calls


def test_failed_picture_only_warns(monkeypatch, tmp_path, caplog):
    def fail(*arguments, **settings):
        raise RuntimeError("no ink")

    Drawn(monkeypatch, np.ones((8, 8)))
    monkeypatch.setattr(connectivity, "draw_connectivity", fail)
    draw_circuit(NAC, Circuit({"mediator": np.ones((8, 8))}, None), tmp_path)
    assert "no ink" in caplog.text


def test_two_processes_write_one_picture(tmp_path):
    """Every process takes part in the read before the picture, or all would wait for the rest."""
    run = (
        "m2mkd_jax.main",
        "--config=configs/m2mkd/digits_nac.py:phase=end_to_end,prior=none",
        "--config.ood.source=",
        "--config.model.mediators=8",
        "--config.model.iterations=1",
        "--config.optim.steps=2",
        "--config.optim.warmup_epochs=0",
        "--config.run.compilation_cache=None",
    )
    finish_pair(tmp_path / "run", run=run, devices=1)
    assert is_picture(tmp_path / "run" / PICTURE)
