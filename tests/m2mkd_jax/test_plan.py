"""The runs of a pipeline: their order, each one's recipe, and the folders they read."""

import dataclasses
import json
import pathlib
import re

import pytest
from meshes import one_device
from tiny import OPTIM, tiny_config, tiny_pipeline

from m2mkd_jax.config import (
    PHASE_NAMES,
    Config,
    DistillConfig,
    ModuleDistillConfig,
    Recipe,
    SourcesConfig,
)
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.phases import PHASES, pipeline
from m2mkd_jax.phases.pipeline import APART, plan, program_folders, run_phase

ROOT = pathlib.Path("/runs")
# No two phases have a field in common.
RECIPES = {
    phase: Recipe(
        dataclasses.replace(OPTIM, steps=10 + number, batch=8 + 2 * number),
        AugmentConfig(padding=number),
        drop_path=number / 10,
    )
    for number, phase in enumerate(PHASE_NAMES)
}


def config_of(*, recipes=RECIPES, **changes) -> Config:
    """A pipeline whose own optim, augment and drop_path differ from every phase's."""
    return dataclasses.replace(
        tiny_pipeline(), recipes=recipes, drop_path=0.9, augment=AugmentConfig(padding=9), **changes
    )


def sources_of(config) -> dict[str, dict]:
    """The sources of each run, by its folder; without empty ones."""
    return {
        folder: {n: value for n, value in dataclasses.asdict(run.sources).items() if value}
        for folder, run in plan(config, ROOT)
    }


def test_every_run_has_its_phase_and_recipe():
    runs = plan(config_of(), ROOT)
    assert [(folder, run.phase) for folder, run in runs] == [
        ("meta", "pretrain_meta"),
        ("modules", "train_module"),
        ("teacher", "assemble"),
        ("students", "distill"),
        ("end_to_end", "end_to_end"),
        ("few_shot", "few_shot"),
    ]
    for _, run in runs:
        assert Recipe(run.optim, run.augment, run.drop_path) == RECIPES[run.phase]
        assert run.module == "all" and run.recipes == {}


def test_phase_names_match_records_in_order():
    assert tuple(PHASES) == PHASE_NAMES


def test_other_fields_come_from_the_pipeline():
    config = config_of(seed=5, precision="bfloat16", module="1")
    own = ("phase", "module", "optim", "augment", "drop_path", "recipes", "sources")
    for _, run in plan(config, ROOT):
        assert run.module == "all"
        for field in dataclasses.fields(Config):
            if field.name not in own:
                assert getattr(run, field.name) == getattr(config, field.name), field.name


def test_every_run_reads_earlier_runs():
    assert sources_of(config_of()) == {
        "meta": {},
        "modules": {"meta": "/runs/meta"},
        "teacher": {"modules": ("/runs/modules",) * 3},
        "students": {"meta": "/runs/meta", "teacher": "/runs/teacher"},
        "end_to_end": {"students": ("/runs/students",) * 3},
        "few_shot": {"network": "/runs/end_to_end"},
    }


def test_baseline_also_reads_the_teacher():
    config = config_of(baseline=DistillConfig("soft"))
    found = sources_of(config)["end_to_end"]
    assert found == {"students": ("/runs/students",) * 3, "teacher": "/runs/teacher"}


def test_nothing_is_trained_for_a_teacher_that_nothing_reads():
    none = ModuleDistillConfig("none")
    found = sources_of(config_of(distill=none))
    assert list(found) == ["meta", "students", "end_to_end", "few_shot"]
    assert found["students"] == {"meta": "/runs/meta"}
    found = sources_of(config_of(distill=none, baseline=DistillConfig("soft")))
    assert list(found) == ["meta", "modules", "teacher", "students", "end_to_end", "few_shot"]
    assert found["end_to_end"]["teacher"] == "/runs/teacher"


def test_given_networks_are_not_trained():
    config = config_of(sources=SourcesConfig(meta="/m", fresh="f", leave="l"))
    found = sources_of(config)
    assert list(found) == ["modules", "teacher", "students", "end_to_end", "few_shot"]
    assert found["modules"]["meta"] == found["students"]["meta"] == "/m"
    assert found["students"]["teacher"] == "/runs/teacher"
    assert all((run["fresh"], run["leave"]) == ("f", "l") for run in found.values())
    found = sources_of(config_of(sources=SourcesConfig(teacher="/t")))
    assert list(found) == ["meta", "students", "end_to_end", "few_shot"]
    assert found["students"] == {"meta": "/runs/meta", "teacher": "/t"}
    config = config_of(sources=SourcesConfig(meta="/m", teacher="/t"), baseline=DistillConfig())
    found = sources_of(config)
    assert list(found) == ["students", "end_to_end", "few_shot"]
    assert found["end_to_end"]["teacher"] == "/t"


def test_phases_without_recipe_are_skipped_or_refused():
    def without(*phases):
        return {phase: recipe for phase, recipe in RECIPES.items() if phase not in phases}

    runs = sources_of(config_of(recipes=without("few_shot")))
    assert "few_shot" not in runs and "end_to_end" in runs
    for phase in PHASE_NAMES[:-1]:
        with pytest.raises(ValueError, match=rf"config\.recipes has no \['{phase}'\]"):
            plan(config_of(recipes=without(phase)), ROOT)
    given = SourcesConfig(meta="/m", teacher="/t")
    unneeded = without("pretrain_meta", "train_module", "assemble")
    assert len(plan(config_of(recipes=unneeded, sources=given), ROOT)) == 3


def deep(pairs_at_once: int, stages: int = 12) -> Config:
    """A pipeline with more than ten stages, whose numbers have two digits."""
    config = config_of(distill=ModuleDistillConfig(pairs_at_once=pairs_at_once))
    sections = {
        name: dataclasses.replace(getattr(config, name), depths=(1,) * stages)
        for name in ("meta", "teacher", "model")
    }
    return dataclasses.replace(config, **sections)


def test_programs_of_a_few_modules_have_their_own_folders():
    found = sources_of(deep(5))
    names = ("0+1+2+3+4", "5+6+7+8+9", "10+11")
    assert list(found)[1:4] == [f"module_{name}" for name in names]
    assert list(found)[5:8] == [f"student_{name}" for name in names]
    held = [names[stage // 5] for stage in range(12)]
    assert found["teacher"]["modules"] == tuple(f"/runs/module_{name}" for name in held)
    assert found["end_to_end"]["students"] == tuple(f"/runs/student_{name}" for name in held)
    modules = {folder: run.modules() for folder, run in plan(deep(5), ROOT)}
    assert modules["student_10+11"] == modules["module_10+11"] == (10, 11)


@pytest.mark.parametrize(
    ("module", "pairs", "folders"),
    [
        ("all", 0, {"one": (0, 1, 2)}),
        ("all", 3, {"one": (0, 1, 2)}),
        ("all", 2, {"several_0+1": (0, 1), "several_2": (2,)}),
        ("2+0", 1, {"several_0": (0,), "several_2": (2,)}),
        ("1", 1, {"one": (1,)}),
    ],
)
def test_one_folder_per_program(module, pairs, folders):
    config = dataclasses.replace(
        tiny_config("distill"), module=module, distill=ModuleDistillConfig(pairs_at_once=pairs)
    )
    found = program_folders(config, one="one", several="several")
    assert {folder: part.modules() for folder, part in found.items()} == folders


def test_programs_run_in_order(monkeypatch, tmp_path):
    ran = []

    def run(config, workdir, mesh, splits):
        ran.append((config.module, workdir))
        return {"module": config.module}

    records = dict(PHASES, distill=dataclasses.replace(PHASES["distill"], run=run))
    monkeypatch.setattr(pipeline, "PHASES", records)
    config = dataclasses.replace(
        tiny_config("distill"), distill=ModuleDistillConfig(pairs_at_once=2)
    )
    assert run_phase(config, tmp_path, one_device()) == {"module": "2"}
    assert ran == [("0+1", tmp_path / "module_0+1"), ("2", tmp_path / "module_2")]
    ran.clear()
    run_phase(tiny_config("distill"), tmp_path, one_device())
    assert ran == [("all", tmp_path)]


@pytest.fixture
def ran(monkeypatch):
    """The folders of the runs that a pipeline starts; nothing is checked or trained."""
    folders = []

    def run(config, workdir, mesh, splits=None):
        if config.phase == "pipeline":
            return pipeline.run_pipeline(config, workdir, mesh)
        folders.append(workdir.name)
        return {"phase": config.phase}

    monkeypatch.setattr(pipeline, "check_pipeline", lambda *arguments: None)
    monkeypatch.setattr(pipeline, "run_phase", run)
    return folders


def test_pipeline_returns_the_result_of_the_whole_student(ran, tmp_path):
    found = pipeline.run_pipeline(config_of(), tmp_path / "a", one_device())
    assert found == {"phase": "end_to_end"}
    assert ran == ["meta", "modules", "teacher", "students", "end_to_end", "few_shot"]
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert stored["phase"] == "pipeline"
    (tmp_path / "a" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="seed: 0 -> 8"):
        pipeline.run_pipeline(config_of(seed=8), tmp_path / "a", one_device())


def test_finished_runs_are_not_started(ran, monkeypatch, tmp_path):
    asked = {}

    def read(folder, config, *, phase, apart):
        asked[folder.name] = (config.phase, phase, apart)
        return {"phase": "done"} if folder.name in ("meta", "end_to_end") else None

    monkeypatch.setattr(pipeline, "read_result", read)
    assert pipeline.run_pipeline(config_of(), tmp_path, one_device()) == {"phase": "done"}
    assert ran == ["modules", "teacher", "students", "few_shot"]
    assert asked["modules"] == ("train_module", "train_module", APART)


def test_finished_run_may_differ_only_in_sources_and_labels():
    for key in ("sources.meta", "sources.students", "data.labels"):
        assert re.fullmatch(APART, key)
    for key in ("data.path", "data.labels.x", "seed", "optim.steps", "sources", "model.width"):
        assert not re.fullmatch(APART, key)
