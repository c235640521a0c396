"""Ownership of a workdir: which configs may resume there, and which files count as results."""

import dataclasses
import json
import logging

import pytest

from common_jax.config import Section
from common_jax.ranges import Size
from common_jax.workdir import claim, contradictions, holds_results, refuse_other_config, versions


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
def test_a_run_has_come_to_something_or_not(tmp_path, path, counts):
    assert not holds_results(tmp_path / "none")
    make(tmp_path / path)
    assert holds_results(tmp_path) == counts


def test_results_are_looked_for_as_deep_as_asked_for(tmp_path):
    make(tmp_path / "a/b/c/d/result.json")
    assert [holds_results(tmp_path, below=below) for below in (0, 3, 4)] == [False, False, True]
    make(tmp_path / "checkpoints/4/x")
    assert holds_results(tmp_path, below=0)


def test_one_whole_checkpoint_beside_an_unfinished_one_counts_and_an_empty_folder_does_not(
    tmp_path,
):
    (tmp_path / "checkpoints").mkdir()
    assert not holds_results(tmp_path)
    make(tmp_path / "checkpoints/8.orbax-checkpoint-tmp-7/x")
    make(tmp_path / "checkpoints/4/x")
    assert holds_results(tmp_path)


def test_another_config_takes_the_place_of_one_that_came_to_nothing(tmp_path, caplog):
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


def test_a_field_that_came_since_has_its_default_and_one_that_went_is_named(tmp_path, caplog):
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


def test_configs_contradict_each_other_in_what_both_have():
    stored = {"seed": 0, "optim": {"lr": 0.1, "old": 1}, "run": {"log_every": 2}}
    config = {"seed": 1, "optim": {"lr": 0.1, "new": 2}, "run": {"log_every": 3}}
    assert contradictions(stored, config) == ["run.log_every: 2 -> 3", "seed: 0 -> 1"]
    assert contradictions(stored, stored) == contradictions({}, config) == []


@pytest.mark.parametrize("path", ["mesh.data", "run.keep", "data.bad_share", "model.vit.remat"])
def test_fields_that_change_no_result_may_change(path):
    def nested(value):
        for key in reversed(path.split(".")):
            value = {key: value}
        return value

    assert contradictions(nested(1), nested(2)) == []
    assert contradictions(nested(1) | {"seed": 0}, nested(2) | {"seed": 1}) == ["seed: 0 -> 1"]
