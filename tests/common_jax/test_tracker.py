"""Logging a run to Weights & Biases: without network, and without the package."""

import json
import sys
import types

import jax
import pytest
from descent import descend

from common_jax import metrics
from common_jax.metrics import Recorder, open_tracker


class Refused(Exception):
    """An error raised by the stand-in."""


class StandIn:
    """Stands in for the package: records its calls."""

    Error, Settings = Refused, dict

    def __init__(self):
        self.calls, self.refuses = [], False

    def init(self, **settings):
        if self.refuses:
            raise Refused("no key")
        self.calls.append(settings)
        return self

    def log(self, values, *, step):
        if self.refuses:
            raise Refused("no answer")
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def package(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def record(tmp_path, project="p"):
    tracker = open_tracker(project, tmp_path / "a" / "run", run_id="abc", config={"seed": 1})
    recorder = Recorder(tmp_path, step=4, tracker=tracker)
    recorder.write(5, 0.5, {"train/loss": 0.25, "train/load": [1.0]})
    recorder.write_timing(5, examples_per_second=2.0, milliseconds=3.0)
    recorder.close()


def test_tracker_logs_the_scalars_of_a_resumed_run(package, tmp_path):
    record(tmp_path)
    settings, *lines, last = package.calls
    expected = {"project": "p", "id": "abc", "name": "a/run", "resume": "allow"}
    assert settings.items() >= (expected | {"config": {"seed": 1}}).items()
    timing = {"timing/examples_per_second": 2.0, "timing/milliseconds_per_step": 3.0}
    assert lines == [(5, {"train/loss": 0.25}), (5, timing)]
    assert last == "finish"


def test_tracker_error_passes_on_the_reason(package, tmp_path):
    package.refuses = True
    with pytest.raises(ValueError, match=r"config\.run\.wandb='p': no key; .*WANDB_MODE=offline"):
        record(tmp_path)


def test_tracker_failure_does_not_fail_the_run(package, tmp_path, caplog):
    tracker = open_tracker("p", tmp_path, run_id="abc", config={})
    package.refuses = True
    recorder = Recorder(tmp_path, step=0, tracker=tracker)
    for step in (1, 2):
        recorder.write(step, 0.5, {"train/loss": 0.25})
    recorder.close()
    assert caplog.text.count("to Weights & Biases (") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_tracker_opens_only_on_the_first_process_and_on_request(package, tmp_path, monkeypatch):
    assert open_tracker(None, tmp_path, run_id="abc", config={}) is None
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert open_tracker("p", tmp_path, run_id="abc", config={}) is None
    assert package.calls == []


@pytest.mark.parametrize("spec", [None, types.SimpleNamespace(origin=None)])
def test_missing_wandb_is_refused_before_anything_is_written(tmp_path, monkeypatch, spec):
    # A folder wandb/ of W&B's records has a spec, but no file that would be imported.
    absent = types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda name: spec))
    monkeypatch.setattr(metrics, "importlib", absent)
    with pytest.raises(ValueError, match=r"config\.run\.wandb='p' needs the package wandb"):
        descend(tmp_path / "run", wandb="p")
    assert not (tmp_path / "run" / "config.json").exists()


def test_offline_run_is_stored_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = tmp_path / "run"
    descend(workdir, wandb="p")
    (workdir / "result.json").unlink()  # as if it had been killed at its end
    descend(workdir, wandb="p")
    run_id = json.loads((workdir / "run.json").read_text())["id"]
    kept = sorted(path.name for path in (workdir / "wandb").glob("offline-run-*"))
    assert kept and all(name.endswith(run_id) for name in kept)
