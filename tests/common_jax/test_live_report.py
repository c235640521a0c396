"""The report while its runs are training."""

import types

import jax
import pytest
from descent import EPOCH, STEPS, descend, make_task

from common_jax.report import live, refresh, reporting, write_report


@pytest.fixture
def now(monkeypatch):
    """now[0] is the current time."""
    clock = [1000.0]
    monkeypatch.setattr(live, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


def test_report_is_written_at_once_then_rarely_and_at_the_end(tmp_path, now):
    made, takes = [], [4.0]

    def write():
        made.append(now[0])
        now[0] += takes[0]

    with reporting(tmp_path / "report.html", write):
        refresh()
        now[0] = 1004.0 + live.SHARE * 4.0 - 0.1
        refresh()
        now[0] += 0.2
        takes[0] = 0.0
        refresh()
        now[0] += live.PAUSE - 0.1
        refresh()
        assert made == [1000.0, pytest.approx(1084.1)]
    assert len(made) == 3
    refresh()
    assert len(made) == 3


def test_other_processes_and_failed_commands_write_no_report(tmp_path, monkeypatch):
    made = []
    with pytest.raises(ValueError, match="odd"), reporting(tmp_path, lambda: made.append(1)):
        raise ValueError("odd")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with reporting(tmp_path, lambda: made.append(1)):
        refresh()
    assert made == []


def test_report_exists_after_the_first_evaluation(tmp_path):
    pages = {}

    def evaluate(params, helpers, step):
        path = tmp_path / "report.html"
        pages[step] = path.read_text() if path.exists() else ""
        return {"w": 0.0}

    write = lambda: write_report(tmp_path, title="all runs")  # noqa: E731
    with reporting(tmp_path / "report.html", write):
        descend(tmp_path / "run", task=make_task(evaluate))
    assert pages[EPOCH] == "" and f"not finished: last line at step {EPOCH}" in pages[2 * EPOCH]
    assert f"steps {STEPS}" in (tmp_path / "report.html").read_text()
