"""The whole method at its smallest, with two stages: every phase runs, passes on its weights, and
is not run twice."""

import dataclasses
import json
import logging
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from meshes import one_device
from together import together

import m2mkd_jax
from common_jax import checkpoint
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.metrics import read_metrics
from m2mkd_jax.config import DistillConfig, SourcesConfig
from m2mkd_jax.data import sources
from m2mkd_jax.moe.config import BalanceConfig, MoeConfig
from m2mkd_jax.phases import pipeline
from m2mkd_jax.phases.pipeline import run_phase

RUNS = [
    "meta",
    "modules",
    "teacher",
    "students",
]


tiny_config = partial(tiny.tiny_config, stages=2)
tiny_pipeline = partial(tiny.tiny_pipeline, stages=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished pipeline."""
    workdir, opened, open_source = tmp_path_factory.mktemp("pipeline"), [], sources.open_source

    def open_and_count(config, split):
        opened.append(split)
        return open_source(config, split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "open_source", open_and_count)
        result = run_phase(tiny_pipeline(), workdir, one_device())
    assert opened == ["train", "test"]  # once for all runs: decoding may take minutes
    assert result == json.loads((workdir / "end_to_end" / "result.json").read_text())
    return workdir


def test_every_run_writes_its_records(finished):
    for run in [*RUNS, "end_to_end", "few_shot"]:
        folder = finished / run
        result = json.loads((folder / "result.json").read_text())
        assert result["skipped"] == 0
        assert 0 <= result["test/accuracy"] <= 1
        assert [
            line["step"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line
        ]
        assert list(folder.glob("events.*"))


def test_finished_pipeline_is_not_rerun(finished, caplog):
    caplog.set_level(logging.INFO)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("metrics.jsonl")}
    run_phase(tiny_pipeline(), finished, one_device())
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("metrics.jsonl")}
    assert caplog.messages[2:4] == ["phase 2 of 6: modules", "modules is already finished"]


def test_pipeline_resumes_where_it_was_stopped(finished, tmp_path):
    for run in RUNS:
        (tmp_path / run).symlink_to(finished / run)
    run_phase(tiny_pipeline(), tmp_path, one_device())
    for run in ("end_to_end", "few_shot"):
        assert (tmp_path / run / "metrics.jsonl").read_bytes() == (
            finished / run / "metrics.jsonl"
        ).read_bytes()


def test_next_phase_starts_from_modules(finished):
    account = json.loads((finished / "teacher" / "warm_start.json").read_text())
    assert [entry["as"] for entry in account["taken"]] == [f"teacher/stage_{i}" for i in range(2)]
    assert account["left"] == account["fresh"] == []
    account = json.loads((finished / "end_to_end" / "warm_start.json").read_text())
    left = {entry["name"].split("/")[3] for entry in account["left"]}
    assert left == {"pre_stitch", "post_stitch"}
    assert {entry["reason"] for entry in account["left"]} == {"config.model.stitches='dropped'"}
    account = json.loads((finished / "few_shot" / "warm_start.json").read_text())
    assert {entry["name"] for entry in account["fresh"]} == {
        "student/stage_1/head/kernel",
        "student/stage_1/head/bias",
    }


def test_training_changes_only_trainable_parameters(finished):
    before = checkpoint.load(finished / "end_to_end", subtree="student")
    after = checkpoint.load(finished / "few_shot", subtree="student")
    head = after["stage_1"].pop("head")
    before["stage_1"].pop("head")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert head["kernel"].shape == (16, 8)
    assert np.any(head["bias"] != 0)


@pytest.mark.parametrize("run", ["meta", "teacher", "end_to_end"])
def test_load_model_loads_whole_networks(finished, run):
    apply, params = m2mkd_jax.load_model(finished / run)
    logits = jax.jit(apply)(params, np.zeros((2, 8, 8, 1), np.uint8))
    assert logits.shape == (2, 10)


def test_module_is_loaded_alone_and_sharded(finished):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    apply, params = m2mkd_jax.load_model(finished / "students", module=0, mesh=mesh)
    assert list(params) == ["stage_0"]
    up = params["stage_0"]["block_0"]["moe"]["up"]
    assert up.sharding.shard_shape(up.shape) == (2, 8, 32)
    with jax.set_mesh(mesh):
        tokens = jax.jit(apply)(params, np.zeros((8, 8, 8, 1), np.uint8))
    assert tokens.shape == (8, 5, 16)


def test_teacher_stage_is_loaded_as_subtree(finished):
    whole = checkpoint.load(finished / "teacher", subtree="teacher")
    part = checkpoint.load(finished / "teacher", subtree="teacher/stage_1")
    jax.tree.map(np.testing.assert_array_equal, whole["stage_1"], part)


def test_logit_distillation_with_whole_teacher_and_kept_stitches(finished, tmp_path):
    config = dataclasses.replace(tiny_config("end_to_end"), baseline=DistillConfig(kind="hard"))
    with pytest.raises(ValueError, match=r"config\.sources\.teacher is empty"):
        run_phase(config, tmp_path / "none", one_device())
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, stitches="kept"),
        sources=SourcesConfig(
            teacher=str(finished / "teacher"), students=(str(finished / "students"),)
        ),
    )
    run_phase(config, tmp_path / "some", one_device())
    account = json.loads((tmp_path / "some" / "warm_start.json").read_text())
    assert account["left"] == []
    lines = read_metrics(tmp_path / "some" / "metrics.jsonl")
    lines = [line for line in lines if "train/loss" in line]
    assert len(lines) == 3
    for line in lines:  # alpha is 1/2, and the loss has no other terms
        assert line["train/distillation"] > 0
        parts = line["train/label_loss"], line["train/distillation"]
        assert line["train/loss"] == pytest.approx(sum(parts) / 2, rel=1e-5)


MOE_SETTINGS = {
    "V-MoE's own": MoeConfig(
        experts=4,
        router="softmax_topk",
        order="priority",
        dispatch="capacity",
        capacity_factor=0.5,
        balance=BalanceConfig(importance=0.01, load=0.01),
    ),
    "expert choice": MoeConfig(experts=4, router="expert_choice", balance=BalanceConfig(z=0.001)),
}


@pytest.mark.parametrize("name", list(MOE_SETTINGS))
def test_every_kind_of_routing_trains(tmp_path, name):
    moe = MOE_SETTINGS[name]
    run_phase(tiny_config("end_to_end", moe=moe), tmp_path, one_device())
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert len(lines) == 3
    assert all(line["train/loss"] > line["train/label_loss"] for line in lines)
    dropped = [line["train/moe/stage_1/block_0/dropped"] for line in lines]
    assert (
        all(share >= 0.4 for share in dropped) if moe.dispatch == "capacity" else not any(dropped)
    )


def test_wrong_sources_are_named(finished, tmp_path):
    config = dataclasses.replace(
        tiny_config("distill"),
        module="1",
        sources=SourcesConfig(meta=str(finished / "teacher"), teacher=str(finished / "teacher")),
    )
    with pytest.raises(ValueError, match=r"holds no 'meta', only \['teacher'\]"):
        run_phase(config, tmp_path / "a", one_device())
    students = str(finished / "students")
    config = dataclasses.replace(
        tiny_config("end_to_end"), sources=SourcesConfig(students=(students,) * 3)
    )
    with pytest.raises(ValueError, match=r"config\.sources\.students names 3 workdirs .* needs 2"):
        run_phase(config, tmp_path / "b", one_device())
    wider = dataclasses.replace(config.model, width=32)
    config = dataclasses.replace(
        config,
        model=wider,
        sources=SourcesConfig(students=(students, students)),
    )
    with pytest.raises(ValueError, match=r"attention/out/bias should be \(32,\) and is \(16,\) in"):
        run_phase(config, tmp_path / "c", one_device())
    assert not (tmp_path / "c" / "config.json").exists()


def test_fresh_weights_that_no_phase_would_train_are_refused_first(tmp_path):
    """In a pipeline the regex also meets the meta model, which later phases load frozen."""
    config = dataclasses.replace(tiny_pipeline(), sources=SourcesConfig(fresh=".*/head/.*"))
    said = r"fresh='\.\*/head/\.\*' matches meta/stage_1/head/bias, but phase='train_module'"
    with pytest.raises(ValueError, match=said):
        run_phase(config, tmp_path / "run", one_device())
    assert not (tmp_path / "run").exists()


def test_recipe_errors_name_the_full_key(tmp_path):
    config = tiny_pipeline()
    recipe = config.recipes["pretrain_meta"]
    large = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, batch=5000))
    config = dataclasses.replace(config, recipes=config.recipes | {"pretrain_meta": large})
    said = r"^config\.recipes\.pretrain_meta\.optim\.batch=5000 must be from 1 to 1437"
    with pytest.raises(ValueError, match=said):
        run_phase(config, tmp_path / "run", one_device())
    assert not (tmp_path / "run").exists()


def test_all_processes_check_the_same_runs_of_a_pipeline(tmp_path, monkeypatch):
    """Checks exchange values, so one that checks a run which another skips would wait forever."""
    monkeypatch.setattr(pipeline, "plan", lambda config, workdir: [("one", config)])
    views = [epath.Path(tmp_path) / str(process) for process in range(2)]
    (views[0] / "one").mkdir(parents=True)
    (views[0] / "one" / "result.json").touch()  # process 1 does not see it yet
    checks = (partial(pipeline.check_pipeline, None, view, one_device()) for view in views)
    assert together(monkeypatch, *checks) == [None, None]
