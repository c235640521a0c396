"""Process 0 decides for all what depends on files that the others may not see yet."""

from functools import partial

from descent import descend
from together import together

from common_jax import checkpoint
from common_jax.checkpoint import reading
from common_jax.workdir import read_result


def test_first_process_reads_the_result_for_all(tmp_path, monkeypatch):
    """Otherwise one that does not see it yet would train alone."""
    first, second = tmp_path / "first", tmp_path / "second"
    for view in (first, second):
        view.mkdir()
        (view / "config.json").write_text('{"seed": 0}')
    (first / "result.json").write_text('{"phase": "descent", "steps": 12}')
    read = (partial(read_result, view, {"seed": 0}, phase="descent") for view in (first, second))
    assert together(monkeypatch, *read) == [{"phase": "descent", "steps": 12}] * 2
    read = (partial(read_result, view, {"seed": 1}, phase="descent") for view in (first, second))
    refused, other = together(monkeypatch, *read)
    assert "holds a run of another config" in str(refused)
    assert isinstance(other, ValueError)


def test_all_processes_load_the_same_step(tmp_path, monkeypatch):
    seen = {"first": [4, 6], "second": [4]}  # the second does not see the newest step yet
    monkeypatch.setattr(reading, "own_steps", lambda folder: seen[folder.parent.name])
    views = [tmp_path / name for name in seen]
    found = together(monkeypatch, *(partial(checkpoint.common_step, view) for view in views))
    assert found == [view / "checkpoints" / "6" for view in views]


def test_step_that_is_named_is_the_common_one(tmp_path):
    descend(tmp_path)
    step = checkpoint.find_step(tmp_path)
    assert checkpoint.common_step(step) == checkpoint.common_step(tmp_path) == step
