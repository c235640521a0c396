"""A refused start leaves its folder free; a pipeline refuses before its first run trains."""

import dataclasses
import functools
import json
import operator

import jax
import numpy as np
import pytest
from meshes import one_device
from tiny import NAC, OPTIM, tiny_config, tiny_pipeline

from common_jax import loop
from common_jax.checkpoint import write_params
from common_jax.config import unfreeze
from common_jax.workdir import claim, holds_results, refuse_other_config
from m2mkd_jax import families
from m2mkd_jax.main import main
from m2mkd_jax.phases.networks import teacher_network


@pytest.fixture(autouse=True)
def nothing_trains(monkeypatch):
    def train(*args, **settings):
        raise AssertionError("a run began")

    monkeypatch.setattr(loop, "_train", train)
    monkeypatch.setattr("m2mkd_jax.main.make_mesh", lambda config: one_device())


def episodes(**changes):
    """A config with two few-shot episodes."""
    config = unfreeze(tiny_config("few_shot", optim=dataclasses.replace(OPTIM, batch=8)))
    config.few_shot.update(episodes=2, **changes)
    return config


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        # 6 steps in all; an epoch has 22.
        (
            "recipes.distill.optim.warmup_epochs",
            1,
            r"config\.recipes\.distill\.optim\.warmup_epochs=1 is a warm-up of 22 steps, and the "
            r"run has only 6 \(config\.recipes\.distill\.optim\.steps=6",
        ),
        (
            "recipes.few_shot.optim.batch",
            64,  # there are 40 images
            r"batch=64 must be from 1 to 40",
        ),
        ("recipes.end_to_end.optim.batch", 1438, r"1438 must be from 1 to 1437"),
        ("few_shot.ways", 11, r"config\.few_shot\.ways=11 must be from 1 to .* 10"),
        ("few_shot.shots", 1000, r"few_shot\.shots=1000, but class \d, which the episode"),
        ("data.labels", 9, r"config\.data\.labels=9"),
        ("seed", 2**32, r"config\.seed=4294967296"),
        ("run.best", "val/bleu", r"config\.run\.best='val/bleu' must be a metric of test/"),
        ("run.best", "test/acuracy", r"best='test/acuracy' must be .* accuracy or accuracy_top5"),
        ("run.best", "test/module_1/accuracy", r"best='test/module_1/accuracy' is never measured"),
        ("sources.teacher", "/nowhere", r"/nowhere does not exist"),
    ],
)
def test_pipeline_is_checked_before_training(tmp_path, path, value, said):
    config = unfreeze(tiny_pipeline())
    *sections, field = path.split(".")
    functools.reduce(operator.getitem, sections, config)[field] = value
    with pytest.raises((ValueError, OSError), match=said):
        main(config, tmp_path / "runs" / "a")
    assert list(tmp_path.iterdir()) == []


def test_mismatched_teacher_is_refused_before_training(tmp_path):
    """Otherwise the meta model would train for hours before the teacher is checked."""
    config = tiny_pipeline()
    other = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, width=24))
    shapes = jax.eval_shape(teacher_network(other).init, jax.random.key(0))
    teacher = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    write_params(tmp_path / "teacher", {"teacher": teacher}, {})
    given = unfreeze(config)
    given.sources.teacher = str(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"should be .*16.* and is .*24"):
        main(given, tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize(("name", "field"), [("vmoe", "left"), ("nac", "fresh")])
def test_what_phases_pass_on_is_checked_before_training(tmp_path, monkeypatch, name, field):
    """A V-MoE's students have stitches that the whole network lacks; a NAC has more than its
    students have."""
    config = tiny_pipeline()
    if name == "nac":
        config = dataclasses.replace(config, model=NAC)
    broken = dataclasses.replace(families.FAMILIES[name], **{field: lambda section: ()})
    monkeypatch.setattr(families, "FAMILIES", {**families.FAMILIES, name: broken})
    with pytest.raises(ValueError, match=r"the weights do not fit:\s+student/(stage_|graph/)"):
        main(unfreeze(config), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_episodes_are_checked_before_training(tmp_path):
    config = episodes(shots=1000)
    write_params(tmp_path / "network", {"student": {"a": np.ones(1)}}, {})
    config.sources.network = str(tmp_path / "network")
    with pytest.raises(ValueError, match=r"config\.few_shot\.shots=1000, but class"):
        main(config, tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["network"]


def test_missing_network_leaves_the_workdir_unclaimed(tmp_path):
    config = episodes()
    config.sources.network = "/nowhere"
    with pytest.raises(FileNotFoundError, match="/nowhere does not exist"):
        main(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_start_without_results_is_replaced(tmp_path, caplog):
    caplog.set_level("INFO")
    for steps in (20, 40):
        refuse_other_config(tmp_path, {"optim": {"steps": steps}})
        claim(tmp_path, {"optim": {"steps": steps}})
    assert json.loads((tmp_path / "config.json").read_text()) == {"optim": {"steps": 40}}
    assert "this config replaces it" in caplog.text


@pytest.mark.parametrize(
    "path",
    [
        "result.json",
        "scores.json",
        "checkpoints/20/params/manifest",
        "checkpoints/damaged_20/params/manifest",
        "few_shot/episode_0/checkpoints/2/params/manifest",
        "alpha=0.3,seed=0/few_shot/episode_0/result.json",
    ],
)
def test_start_with_results_is_kept(tmp_path, path):
    claim(tmp_path, {"optim": {"steps": 20}})
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("{}")
    with pytest.raises(ValueError, match=r"optim\.steps: 20 -> 40"):
        refuse_other_config(tmp_path, {"optim": {"steps": 40}})


def test_unfinished_save_does_not_count_as_a_result(tmp_path):
    (tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert not holds_results(tmp_path)
