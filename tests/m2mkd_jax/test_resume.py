"""Killed runs continue as if nothing had happened: the same lines in metrics.jsonl, byte for
byte."""

import json
import re

import pytest
from processes import says, start

from common_jax.checkpoint import finished_steps
from m2mkd_jax.phases.training import refuse_other_classes


def unfinished_saves(workdir) -> list[str]:
    folder = workdir / "checkpoints"
    return [path.name for path in folder.glob("*tmp*")] if folder.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    start(workdir).finish()
    return workdir


def same_run(workdir, undisturbed) -> bool:
    names = ("metrics.jsonl", "result.json", "config.json")
    return all((workdir / n).read_bytes() == (undisturbed / n).read_bytes() for n in names)


def test_metrics_lines_of_44_steps(undisturbed):
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [*range(3, 43, 3), 44]
    assert [line["step"] for line in lines if "test/accuracy" in line] == [11, 22, 33, 44]


def test_run_resumes_after_kills_and_a_damaged_checkpoint(undisturbed, tmp_path):
    """A single run for all three cases, since starts spend most of their time importing and
    compiling."""
    workdir = tmp_path / "run"
    process, folder = start(workdir), workdir / "checkpoints"
    process.kill(when=lambda: finished_steps(folder) and unfinished_saves(workdir))
    assert unfinished_saves(workdir)

    process = start(workdir)
    # past the next checkpoint, between two lines of the log
    process.kill(when=lambda: says(workdir / "metrics.jsonl", '"step": 39'))
    assert "removing the unfinished checkpoint" in process.output()
    older, newest = finished_steps(folder)[-2:]
    assert 0 < older < newest < 39

    for path in (folder / str(newest) / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500])
    output = start(workdir).finish()
    assert f"checkpoint {folder / str(newest)} cannot be read" in output
    assert not unfinished_saves(workdir)
    assert same_run(workdir, undisturbed)


def test_changed_config_is_refused_with_the_difference(undisturbed):
    before = {path: path.read_bytes() for path in undisturbed.glob("*.json*")}
    process = start(undisturbed, "--config.optim.lr=3e-3", "--config.model.moe.experts=8")
    assert process.end() == 2
    assert "model.moe.experts: 4 -> 8" in process.output()
    assert "optim.lr: 0.001 -> 0.003" in process.output()
    assert before == {path: path.read_bytes() for path in undisturbed.glob("*.json*")}


def test_changed_class_list_is_refused(undisturbed, tmp_path):
    names = [str(digit) for digit in range(10)]
    refuse_other_classes(undisturbed, names)
    refuse_other_classes(tmp_path, names[1:])  # nothing is trained there yet
    for other, said in (
        ([*names[1:], "x"], "class 0 named '0', but config.data now names it '1'"),
        (names[:-1], "class 9 named '9', but config.data now names it None"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            refuse_other_classes(undisturbed, other)
