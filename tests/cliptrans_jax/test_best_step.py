"""The checkpoint used for translation and scoring: the best by its validation metric."""

import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest
from changed import changed
from etils import epath
from meshes import one_device
from tiny_cliptrans import tiny_config, tiny_pipeline, write_corpus, write_run
from together import together

from cliptrans_jax.runs import translation
from cliptrans_jax.runs.finished import find, text_tower
from cliptrans_jax.runs.translation import best_step
from common_jax import checkpoint
from common_jax.config import unfreeze
from common_jax.run_config import RunConfig
from common_jax.state import TrainState
from common_jax.workdir import write_json


def test_best_checkpoint_is_the_earliest_with_the_highest_score(tmp_path):
    run, none = tmp_path / "run", np.zeros((), np.int32)
    checkpoints = checkpoint.Checkpoints(run, keep=3, best=None)
    for step in (3, 6, 9):
        state = TrainState(np.int32(step), {"w": np.ones(1)}, {}, None, {}, none, none)
        checkpoints.save(state, step=step, config={}, metrics=None)
    checkpoints.close()
    lines = [(3, 4.0), (6, 7.0), (9, 7.0), (12, 9.0)]  # step 12 has no checkpoint left
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "epoch": step / 3, "val/bleu": bleu}) + "\n"
            for step, bleu in lines
        )
    )
    scheduled = RunConfig(best="val/bleu")
    assert best_step(epath.Path(run), scheduled).name == "6"
    assert best_step(epath.Path(run), RunConfig(best=None)).name == "9"
    # With a save every third epoch, steps 3 and 6 were saved when the run was interrupted.
    rarely = dataclasses.replace(scheduled, checkpoint_every=3)
    assert best_step(epath.Path(run), rarely).name == "9"
    # The last step of a finished run counts whatever its epoch.
    (run / "result.json").write_text('{"steps": 6}')
    assert best_step(epath.Path(run), rarely).name == "6"


def test_all_processes_use_the_checkpoint_that_the_first_chooses(tmp_path, monkeypatch):
    """Process 1 does not see yet that the run has ended, so for it the last step is not due."""
    monkeypatch.setattr(checkpoint, "own_steps", lambda folder: [4, 5])
    lines = [{"step": 4, "epoch": 2, "val/bleu": 10.0}, {"step": 5, "epoch": 2.5, "val/bleu": 20.0}]
    views = [epath.Path(tmp_path) / str(process) for process in range(2)]
    for view in views:
        view.mkdir()
        (view / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (views[0] / "result.json").write_text('{"steps": 5}')
    run = RunConfig(best="val/bleu")
    found = together(monkeypatch, *(functools.partial(best_step, view, run) for view in views))
    assert found == [view / "checkpoints" / "5" for view in views]


@pytest.mark.parametrize(
    ("values", "best"), [((4.0, math.nan, 3.0), "3"), ((math.nan, 2.0, math.inf), "6")]
)
def test_non_finite_metric_never_selects_a_checkpoint(tmp_path, monkeypatch, values, best):
    monkeypatch.setattr(checkpoint, "own_steps", lambda folder: [3, 6, 9])
    lines = [
        {"step": step, "val/bleu": value} for step, value in zip((3, 6, 9), values, strict=True)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert best_step(epath.Path(tmp_path), RunConfig(best="val/bleu")).name == best


def test_finished_run_refuses_to_be_scored_by_another_metric(tmp_path):
    config, run = tiny_config("translate", None), epath.Path(tmp_path)
    (run / "config.json").write_text(json.dumps(unfreeze(config).to_dict()))
    (run / "result.json").write_text('{"phase": "translate", "steps": 6}')
    (run / "scores.json").write_text('{"bleu": 7.0}')
    assert translation.run(config, run, one_device())["test"] == {"bleu": 7.0}
    said = r"^config\.run\.best=None, but .* chosen by 'val/bleu': give --config\.run\.best=val/bl"
    with pytest.raises(ValueError, match=said):
        translation.run(changed("run.best", None, config), run, one_device())


def test_checkpoint_folder_with_another_name_is_used_directly(tmp_path):
    run = epath.Path(tmp_path) / "run"
    run.mkdir()
    write_run(run, tiny_config("translate", write_corpus(tmp_path / "corpus")))
    shutil.copytree(run / "checkpoints", run / "backup")
    assert find(run / "checkpoints").step.parent == run / "checkpoints"
    assert find(run / "backup").step.parent == run / "backup"


def test_unfinished_runs_and_pipelines_give_a_warning(tmp_path, caplog):
    folder = epath.Path(tmp_path)
    config = tiny_pipeline(write_corpus(tmp_path / "corpus"))
    write_json(folder / "config.json", unfreeze(config).to_dict())
    write_run(folder / "caption", tiny_config("caption", tmp_path / "corpus"))

    def warnings():
        caplog.clear()
        assert find(folder).workdir == folder / "caption"
        return [line for line in caplog.messages if "not finished" in line]

    whole, run = warnings()
    assert whole.startswith(f"{folder} is not finished: its run of stage 'caption' is used")
    assert "that of stage 'translate' has no checkpoint" in whole
    assert run.startswith(f"{folder / 'caption'} is not finished; one of its checkpoints")
    write_json(folder / "caption" / "result.json", {})
    assert warnings() == [whole]
    recipes = {name: config.recipes[name] for name in ("clip", "caption")}
    shorter = dataclasses.replace(config, recipes=recipes)
    write_json(folder / "config.json", unfreeze(shorter).to_dict())
    assert warnings() == []


def test_moved_pipeline_is_used_with_its_own_towers(tmp_path, caplog):
    new, corpus = epath.Path(tmp_path) / "new", write_corpus(tmp_path / "corpus")
    write_run(new / "clip", tiny_config("clip", corpus))
    config = changed("sources.clip", "/old/pipe/clip", tiny_config("translate", corpus))
    write_run(new / "translate", config)
    write_json(new / "config.json", unfreeze(tiny_pipeline(corpus)).to_dict())
    run = find(new)
    assert run.config.sources.clip == str(new / "clip")
    assert "config.sources.clip='/old/pipe/clip' does not exist; " in caplog.text
    text_tower(run, one_device())
    given = find(new, settings={"sources.clip": "/given"})
    assert given.config.sources.clip == "/given"
    with pytest.raises(FileNotFoundError, match=r"config\.sources\.clip='/given': .* give a run's"):
        text_tower(given, one_device())
    # Without the pipeline, a run beside it is another run.
    (new / "config.json").unlink()
    assert find(new / "translate").config.sources.clip == "/old/pipe/clip"
