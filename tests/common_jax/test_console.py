"""What a run says on the terminal."""

import io
import logging
import types

import jax
import pytest
from descent import OPTIM, descend, make_task
from meshes import one_device

from common_jax.log import Console, bars, conclude, console, introduce, progress
from common_jax.optim import OptimConfig
from common_jax.task import abstract_state


class Terminal(io.StringIO):
    """A terminal that keeps everything ever written to it."""

    def isatty(self):
        return True


@pytest.fixture
def at(monkeypatch):
    """at(seconds) sets the time."""
    now = [100.0]
    monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def set_to(seconds):
        now[0] = 100.0 + seconds

    return set_to


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def loss(value):
    return {"train/loss": value, "train/skipped": 0, "train/learning_rate": 1e-3, "train/x": 9.0}


def test_log_lines_are_throttled_and_show_the_latest_values(at, said):
    shown = Console("run", step=4, total=44, shown=("train/loss", "train/skipped", "test/score"))
    at(20)
    shown.advance(5)
    shown.show(loss(0.51234))
    at(29.9)
    shown.advance(14)
    shown.show({"test/score": 0.25})
    at(40)
    shown.advance(24)
    shown.show(loss(0.5) | {"train/skipped": 3, "examples_per_second": 128.0})
    shown.advance(44)
    shown.show({"test/score": 0.75})
    shown.close()
    rate, last = "learning rate 0.001", "learning rate 0.001  examples/s 128"
    assert said.messages == [
        "run: compiling the step (usually 5 to 60 s, less if cached)",
        "run: first step after 20 s",
        f"run  step 5/44  loss 0.5123  {rate}",
        # 19 steps in 20 seconds, and 20 steps are left.
        f"run  step 24/44  loss 0.5  skipped 3  test/score 0.25  {last}  00:21 left",
        f"run  step 44/44  loss 0.5  skipped 3  test/score 0.75  {last}",
    ]


def test_time_left_does_not_include_compilation(at, said):
    shown = Console("run", step=0, total=44, shown=("train/loss",))
    shown.compiled(1, 15)  # said anyway
    at(20)
    shown.advance(1)
    at(70)
    shown.compiled(3, 40)
    shown.advance(3)
    shown.show(loss(0.5))
    assert said.messages[1:] == [
        "run: first step after 20 s",
        "run: step 3 has a batch of another shape; compiling took 40 s",
        # 2 steps in 10 seconds, and 41 steps are left.
        "run  step 3/44  loss 0.5  learning rate 0.001  03:25 left",
    ]


def test_last_line_is_not_repeated_at_the_end(at, said):
    shown = Console("run", step=0, total=1)
    shown.advance(1)
    shown.show({"examples_per_second": 3})
    shown.close()
    assert sum("step 1/1" in message for message in said.messages) == 1


def test_terminal_shows_a_progress_bar(at, said, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(console.sys, "stderr", terminal)
    shown = Console("run", step=4, total=8, shown=("train/loss",))
    shown.advance(5)
    shown.show(loss(0.25))
    shown.advance(6)
    shown.advance(8)
    shown.close()
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("run  step 8/8 |")
    assert "left, loss 0.25  learning rate 0.001" in last
    assert not any("step 8/8" in message for message in said.messages)


def test_other_processes_print_nothing(said, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    shown = Console("run", step=0, total=2, shown=("train/loss",))
    shown.advance(1)
    shown.show(loss(0.25))
    shown.close()
    assert not said.messages


def test_introduction_describes_the_run(said, tmp_path):
    task = make_task(lambda params, helpers, step: {"w": 0.0})
    abstract = abstract_state(task, OPTIM, one_device())
    introduce(task, OPTIM, abstract, one_device(), tmp_path, {"precision": "bfloat16"})
    assert said.messages == [
        "descent: 1 x cpu in 1 process, mesh data 1 x fsdp 1 x expert 1, bfloat16",
        "descent: trains 1 parameters, with 0 frozen, for 12 steps of 8 examples (3 epochs)",
        f"descent: its log is {tmp_path / 'metrics.jsonl'}",
    ]


@pytest.mark.parametrize(
    ("schedule", "lr", "warns"),
    [("warmup_cosine", 1e-4, True), ("warmup_cosine", 1.0, False), ("constant", 1e-4, False)],
)
def test_peak_learning_rate_below_min_lr_causes_a_warning(said, tmp_path, schedule, lr, warns):
    optim = OptimConfig(schedule=schedule, lr=lr, lr_per=512, batch=8, min_lr=1e-5)
    task = make_task(lambda params, helpers, step: {"w": 0.0})
    abstract = abstract_state(task, optim, one_device())
    introduce(task, optim, abstract, one_device(), tmp_path, {})
    warning = (
        "descent: the learning rate rises to min_lr=1e-05, which is above its peak of 1.5625e-06 "
        "(lr=0.0001 for lr_per=512 examples, with batch=8)"
    )
    assert (said.messages[0] == warning) == warns


def test_run_prints_its_messages_in_order(said, tmp_path):
    descend(tmp_path / "run")
    starts = (
        "1 x cpu",
        "trains 1",
        "its log",
        "compiling",
        "first step",
        "step 1/12",
        "step 12/12",
    )
    places = [
        next(i for i, message in enumerate(said.messages) if start in message) for start in starts
    ]
    assert places == sorted(places)


def test_conclusion_shows_scores_and_the_next_command(said):
    conclude({"test/accuracy": 0.98765, "test/loss": 1}, "use RUN")
    conclude({})
    assert said.messages == [
        "finished: test/accuracy 0.9877, test/loss 1",
        "to use it: use RUN",
        "finished",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_yields_every_item_and_reports_percentages(monkeypatch, caplog, terminal):
    times = iter([0.0, 4.0, 12.0, 15.0, 25.0])
    monkeypatch.setattr(bars.sys.stderr, "isatty", lambda: terminal, raising=False)
    if not terminal:
        monkeypatch.setattr(bars.time, "monotonic", lambda: next(times))
    with caplog.at_level(logging.INFO):
        assert list(progress("abcd", total=4, title="reading")) == list("abcd")
    said = [] if terminal else ["reading: 50 % in 12 s", "reading: 100 % in 25 s"]
    assert [record.message for record in caplog.records] == said


def test_progress_without_a_total_counts_and_only_process_0_logs(monkeypatch, caplog):
    monkeypatch.setattr(bars, "LOG_SECONDS", 0)
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with caplog.at_level(logging.INFO):
            assert list(progress("ab", title="encoding", unit="batch")) == list("ab")
    messages = [record.message for record in caplog.records]
    assert messages == ["encoding: 1 x batch in 0 s", "encoding: 2 x batch in 0 s"]
