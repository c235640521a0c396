"""Ownership of a workdir: which configs may resume there, and which files count as results."""

import dataclasses
import importlib
import json
import logging

import pytest
from etils import epath

from common_jax.config import Section
from common_jax.ranges import Size
from common_jax.report.gather import find_runs
from common_jax.workdir import claim, contradictions, holds_results, refuse_other_config, versions

claim_module = importlib.import_module("common_jax.workdir.claim")  # hidden by its function


@dataclasses.dataclass(frozen=True)
class Ring(Section):
    kind: str = "ring"
    size: Size = 3


@dataclasses.dataclass(frozen=True)
class Star(Section):
    kind: str = "star"
    centre: bool = True


@dataclasses.dataclass(frozen=True)
class Config(Section):
    seed: int = 0
    sides: tuple[tuple[int, ...], ...] = ((1, 2),)
    shape: Ring | Star = Ring()
    parts: dict[str, Ring] = dataclasses.field(default_factory=dict)


def make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("result.json", True),
        ("scores.json", True),
        ("metrics.jsonl", False),
        ("checkpoints/4/x", True),
        ("checkpoints/damaged_4/x", True),
        ("checkpoints/4.orbax-checkpoint-tmp-7/x", False),
        ("a/b/c/result.json", True),
        ("a/b/c/checkpoints/4/x", True),
        ("a/b/c/d/result.json", False),
        ("a/b/metrics.jsonl", False),
    ],
)
def test_holds_results_recognises_run_outputs(tmp_path, path, counts):
    assert not holds_results(tmp_path / "none")
    make(tmp_path / path)
    assert holds_results(tmp_path) == counts


def test_results_are_searched_to_the_given_depth(tmp_path):
    make(tmp_path / "a/b/c/d/result.json")
    assert [holds_results(tmp_path, below=below) for below in (0, 3, 4)] == [False, False, True]
    make(tmp_path / "checkpoints/4/x")
    assert holds_results(tmp_path, below=0)


def test_one_finished_checkpoint_counts_as_results(
    tmp_path,
):
    (tmp_path / "checkpoints").mkdir()
    assert not holds_results(tmp_path)
    make(tmp_path / "checkpoints/8.orbax-checkpoint-tmp-7/x")
    make(tmp_path / "checkpoints/4/x")
    assert holds_results(tmp_path)


def test_unreadable_folder_holds_no_results(tmp_path, monkeypatch):
    # As root, every folder may be read.
    (tmp_path / "lost+found").mkdir()
    make(tmp_path / "run" / "result.json")
    kind, listed = type(epath.Path(tmp_path)), type(epath.Path(tmp_path)).iterdir

    def iterdir(folder):
        if folder.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(kind, "iterdir", iterdir)
    assert not holds_results(tmp_path / "lost+found")
    assert holds_results(tmp_path)
    assert find_runs(epath.Path(tmp_path)) == []


def test_unchanged_config_is_not_rewritten(tmp_path, monkeypatch):
    claim(tmp_path, Config(sides=[(1, 2)]))

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(claim_module, "require", read_only)
    monkeypatch.setattr(claim_module, "write_json", read_only)
    claim(tmp_path, Config(sides=[(1, 2)]))
    with pytest.raises(OSError, match="Read-only"):
        claim(tmp_path, Config(seed=1))


def test_config_of_a_run_without_results_is_replaced(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    refuse_other_config(tmp_path, Config(seed=1))  # there is none
    claim(tmp_path, Config(seed=0))
    refuse_other_config(tmp_path, Config(seed=0, sides=[[1, 2]]))
    assert "replaces it" not in caplog.text
    refuse_other_config(tmp_path, Config(seed=1))
    assert "has no checkpoint yet: this config replaces it" in caplog.text
    make(tmp_path / "result.json")
    refuse_other_config(tmp_path, Config(seed=0))
    refuse_other_config(tmp_path, Config(seed=1), apart="seed|other")
    with pytest.raises(ValueError, match=r"holds a run of another config:\n  seed: 0 -> 1\ngive"):
        refuse_other_config(tmp_path, Config(seed=1), apart="see")
    claim(tmp_path, Config(seed=1))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


def test_new_fields_get_defaults_and_removed_ones_are_reported(tmp_path, caplog):
    stored = {"sides": [[1, 2]], "gone": 5, "shape": {"kind": "star", "size": 7}}
    filled, gone = versions.fill(Config, stored)
    assert filled == {
        "seed": 0,
        "sides": [[1, 2]],
        "shape": {"kind": "star", "centre": True},
        "parts": {},
    }
    assert gone == {"gone": 5, "shape.size": 7}
    filled, gone = versions.fill(Config, {"parts": {"a": {"old": 1}}, "shape": {"size": 9}})
    assert filled["parts"] == {"a": {"kind": "ring", "size": 3}}
    assert (filled["shape"], gone) == ({"kind": "ring", "size": 9}, {"parts.a.old": 1})
    (tmp_path / "config.json").write_text(json.dumps(stored))
    make(tmp_path / "result.json")
    refuse_other_config(tmp_path, Config(shape=Star()))
    assert "this version has no config.gone=5, config.shape.size=7" in caplog.text
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        refuse_other_config(tmp_path, Config(seed=1, shape=Star()))


def test_configs_are_compared_on_shared_fields_only():
    stored = {"seed": 0, "optim": {"lr": 0.1, "old": 1}, "run": {"eval_every": 2}}
    config = {"seed": 1, "optim": {"lr": 0.1, "new": 2}, "run": {"eval_every": 3}}
    assert contradictions(stored, config) == ["run.eval_every: 2 -> 3", "seed: 0 -> 1"]
    assert contradictions(stored, stored) == contradictions({}, config) == []


def test_runs_moved_together_still_match_their_sources(tmp_path):
    def config(root, teacher="teacher"):
        runs = [f"{root}/modules/module_{i}" for i in range(2)]
        return {"seed": 0, "sources": {"teacher": f"{root}/{teacher}", "modules": runs}}

    old, new = config("/old/pipe"), config(tmp_path)
    for workdir in (tmp_path / "network", tmp_path / "students" / "module_0"):
        assert contradictions(old, new, workdir=workdir) == []
        make(workdir / "result.json")
        claim(workdir, old)
        refuse_other_config(workdir, new)
        other = config(tmp_path, teacher="another")
        assert len(contradictions(old, other, workdir=workdir)) == 1
        with pytest.raises(
            ValueError, match=r"config:\n  sources\.teacher: '/old/pipe/teacher' -> "
        ):
            refuse_other_config(workdir, other)
    # Elsewhere these are other runs.
    assert len(contradictions(old, new, workdir="/elsewhere/pipe/network")) == 2
    assert len(contradictions(old, new)) == 2


@pytest.mark.parametrize("path", ["mesh.data", "run.keep", "data.bad_share", "model.vit.remat"])
def test_fields_without_effect_on_results_may_change(path):
    def nested(value):
        for key in reversed(path.split(".")):
            value = {key: value}
        return value

    assert contradictions(nested(1), nested(2)) == []
    assert contradictions(nested(1) | {"seed": 0}, nested(2) | {"seed": 1}) == ["seed: 0 -> 1"]
