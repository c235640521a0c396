"""The runs of a pipeline: their order, recipes, towers and initial weights."""

import dataclasses
from functools import partial

from etils import epath
from meshes import one_device
from tiny_cliptrans import tiny_config
from together import together

from cliptrans_jax.config import Recipe, SourcesConfig
from cliptrans_jax.runs import pipeline as pipelines
from cliptrans_jax.runs.pipeline import plan
from common_jax.optim import OptimConfig


def pipeline(*, sources=None, **changes):
    """All stages, no two with equal recipes."""
    recipes = {
        stage: Recipe(OptimConfig(steps=number, batch=8), label_smoothing=number / 100)
        for number, stage in enumerate(("triplet", "translate", "text_recon", "caption", "clip"), 1)
    }
    config = tiny_config("pipeline", None)
    given = SourcesConfig(**(sources or {}))
    return dataclasses.replace(config, recipes=recipes, sources=given, **changes)


def test_each_stage_has_its_recipe_and_the_previous_weights(tmp_path):
    runs = plan(pipeline(), tmp_path)
    assert [name for name, _ in runs] == ["clip", "caption", "text_recon", "translate", "triplet"]
    assert [one.optim.steps for _, one in runs] == [5, 4, 3, 2, 1]
    assert [one.label_smoothing for _, one in runs] == [0.05, 0.04, 0.03, 0.02, 0.01]
    start = ["", "", *(str(tmp_path / name) for name in ("caption", "text_recon", "translate"))]
    assert [one.sources.model for _, one in runs] == start
    assert [one.sources.clip for _, one in runs] == ["", *[str(tmp_path / "clip")] * 4]
    assert {one.features for _, one in runs} == {str(tmp_path / "features")}
    assert all(one.recipes == {} and one.stage == name for name, one in runs)


def test_pipeline_starts_from_given_sources(tmp_path):
    for towers in ({"clip": "c"}, {"clip_text": "t"}, {"clip_image": "i"}, {"siglip": "s"}):
        config = pipeline(sources=towers | {"model": "released"}, features="kept")
        runs = plan(config, tmp_path)
        assert [name for name, _ in runs] == ["caption", "text_recon", "translate", "triplet"]
        assert [one.sources.model for _, one in runs][:2] == ["released", str(tmp_path / "caption")]
        for _, one in runs:
            assert {name: getattr(one.sources, name) for name in towers} == towers
            assert one.features == "kept"
    runs = plan(pipeline(sources={"mbart": "published"}), tmp_path)
    assert [one.sources.mbart for _, one in runs] == ["published", "published", "", "", ""]
    runs = plan(
        pipeline(sources={"model": "a", "fresh": "mapper/.*", "leave": "clip/.*"}), tmp_path
    )
    fresh = [(one.sources.fresh, one.sources.leave) for name, one in runs if name != "clip"]
    assert fresh == [("mapper/.*", "clip/.*"), ("", ""), ("", ""), ("", "")]


def test_settings_of_one_stage_do_not_reach_others(tmp_path):
    runs = dict(plan(pipeline(all_languages=True, unfreeze_clip=True), tmp_path))
    assert [name for name, one in runs.items() if one.all_languages] == ["caption", "text_recon"]
    assert [name for name, one in runs.items() if one.unfreeze_clip] == ["translate"]


def test_all_processes_check_the_same_runs_of_a_pipeline(tmp_path, monkeypatch):
    """Checks exchange values, so one that checks a run which another skips would wait forever."""
    monkeypatch.setattr(pipelines, "plan", lambda config, workdir: [("one", config)])
    views = [epath.Path(tmp_path) / str(process) for process in range(2)]
    (views[0] / "one").mkdir(parents=True)
    (views[0] / "one" / "result.json").touch()  # process 1 does not see it yet
    checks = (
        partial(pipelines.check_pipeline, tiny_config("translate", None), view, one_device())
        for view in views
    )
    assert together(monkeypatch, *checks) == [None, None]
