"""Resuming with the log of an earlier start: whole, with other intervals, cut, or edited."""

import re

import numpy as np
import pytest
from descent import OPTIM, descend, make_task

from common_jax.checkpoint import finished_steps
from common_jax.metrics import read_metrics

SCORES = {4: 0.9, 8: 0.5, 12: 0.4}
BEST = {"best": "test/accuracy", "keep": 1}


class Ended(Exception):
    """The machine has failed."""


def scored(until=12):
    """The descent, with a score for every epoch; ends in the evaluation after step `until`."""

    def evaluate(params, helpers, step):
        if step > until:
            raise Ended
        return {"accuracy": SCORES[step]}

    return make_task(evaluate)


@pytest.fixture
def resumes(tmp_path):
    """A run that ended in step 12's evaluation, so that it resumes at step 8."""
    with pytest.raises(Ended):
        descend(tmp_path, task=scored(8), **BEST)
    assert finished_steps(tmp_path / "checkpoints") == [4, 8]
    return tmp_path


@pytest.mark.parametrize("lines", [None, 2])
def test_checkpoints_whose_scores_are_lost_are_kept_with_a_warning(resumes, lines, caplog):
    record = resumes / "metrics.jsonl"
    if lines is None:
        record.unlink()
    else:
        record.write_text("".join(record.read_text().splitlines(True)[:lines]))
    descend(resumes, task=scored(), **BEST)
    assert finished_steps(resumes / "checkpoints") == [4, 8, 12]
    assert f"{record} lacks the evaluations of steps [4]: lines of the log are lost" in caplog.text


def test_checkpoint_with_a_lower_score_in_the_log_is_deleted(resumes, caplog):
    descend(resumes, task=scored(), **BEST)
    assert finished_steps(resumes / "checkpoints") == [4, 12]
    assert "lacks" not in caplog.text


def test_first_line_after_another_log_interval_has_only_the_steps_since_the_last(tmp_path):
    def losses(folder):
        log = read_metrics(folder / "metrics.jsonl")
        return {line["step"]: line["train/loss"] for line in log if "train/loss" in line}

    descend(tmp_path / "each", log_every=1)
    with pytest.raises(Ended):
        descend(tmp_path / "run", task=scored(4), log_every=4)
    descend(tmp_path / "run", task=scored(), log_every=3)
    each, found = losses(tmp_path / "each"), losses(tmp_path / "run")
    assert list(found) == [4, 6, 9, 12]
    for step, since in ((4, 1), (6, 5), (9, 7), (12, 10)):
        wanted = np.mean([each[k] for k in range(since, step + 1)])
        assert found[step] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"epoch": 2.0', '"epoch": [2.0]', 'line 9: has "epoch": [2.0], which is not a finite'),
        ('"epoch": 2.0', '"epoch": NaN', 'line 9: has "epoch": nan, which is not a finite number'),
        ("0.9}", "[0.9]}", "test/accuracy of step 4 is [0.9], which is not a number; fix or"),
    ],
)
def test_edited_log_is_refused_by_name(resumes, old, new, said):
    record = resumes / "metrics.jsonl"
    text = record.read_text()
    assert old in text
    record.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        descend(resumes, task=scored(), **BEST)
    assert str(record) in str(error.value)
    assert finished_steps(resumes / "checkpoints") == [4, 8]


def test_log_of_shorter_epochs_than_a_step_does_not_divide_by_zero(tmp_path, caplog):
    with pytest.raises(Ended):
        descend(tmp_path, task=scored(4), optim=OPTIM)
    record = tmp_path / "metrics.jsonl"
    record.write_text(record.read_text().replace('"epoch": 1.0', '"epoch": 1e9'))
    descend(tmp_path, task=scored(), optim=OPTIM)
    assert "an epoch has 4 steps, and had 1" in caplog.text
