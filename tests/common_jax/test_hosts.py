"""Two processes as one run: the same numbers as in one process, and a common stop."""

import contextlib
import functools
import json
import shutil
import signal
import zlib

import jax
import numpy as np
import pytest
from processes import finish_all, finish_pair, pair, says, start
from together import together

from common_jax import hosts, signals
from common_jax.checkpoint import finished_steps

TWO_EPOCHS = "--config.optim.steps=22"


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_numbers(workdir, other, *, tolerance: float) -> None:
    """Compares the losses and accuracies of two runs on different devices."""
    found, expected = lines(workdir), lines(other)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, two in zip(found, expected, strict=True):
        for name in ("train/loss", "test/loss", "test/accuracy"):
            assert (name in one) == (name in two)
            if name in one:
                np.testing.assert_allclose(one[name], two[name], rtol=tolerance)


def assert_same_files(workdir, other) -> None:
    for name in ("metrics.jsonl", "result.json", "config.json"):
        assert (workdir / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    first, second = finish_pair(workdir, TWO_EPOCHS, devices=2)
    assert "process 0 of 2, with 2 of 4 devices" in first
    assert "end_to_end  step 22/22" in first
    assert "end_to_end  step" not in second  # process 0 reports for both
    return workdir


def test_pair_stopped_while_compiling_then_killed_resumes_bitwise(undisturbed, tmp_path):
    """A single run for both, since starts spend most of their time compiling. `faults.py` stops at
    more moments."""
    workdir = tmp_path / "run"
    with pair(workdir, TWO_EPOCHS, devices=2) as (first, second):
        second.send(signal.SIGTERM, when=lambda: "process 1 of 2, with" in second.output())
        outputs = finish_all((first, second))
    (step,) = finished_steps(workdir / "checkpoints")
    assert step < 5
    assert all(f"saved at step {step}" in output for output in outputs)

    with pair(workdir, TWO_EPOCHS, devices=2) as (first, second):
        second.send(signal.SIGKILL, when=lambda: says(workdir / "metrics.jsonl", '"step": 15'))
        assert first.process.wait(timeout=60) != 0
    assert "another task died" in first.output() or "ends here" in first.output()
    assert finished_steps(workdir / "checkpoints")[-1] == 11

    finish_pair(workdir, TWO_EPOCHS, devices=2)
    assert_same_files(workdir, undisturbed)


def test_one_and_two_processes_agree_and_resume_each_other(undisturbed, tmp_path):
    """In the second epoch, after two processes ran the first."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "22")
    first = [line for line in lines(workdir) if line["step"] <= 11]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in first))

    alone = start(workdir, TWO_EPOCHS, devices=4)
    alone.send(signal.SIGTERM, when=lambda: says(workdir / "metrics.jsonl", '"step": 12'))
    assert "stopped as requested; the same command resumes" in alone.finish()
    assert 12 <= finished_steps(workdir / "checkpoints")[-1] < 22
    finish_pair(workdir, TWO_EPOCHS, devices=2)
    assert_same_numbers(workdir, undisturbed, tolerance=1e-5)


def test_processes_with_different_flags_end_together(tmp_path):
    workdir = tmp_path / "run"
    with pair(workdir, second=("--config.optim.lr=0.5", "--config.data.workers=1")) as processes:
        assert [one.end() for one in processes] == [2, 2]
        for one in processes:
            assert "process 0 -> process 1):\n  config.optim.lr: " in one.output()
            assert " -> 0.5\ngive all processes the same" in one.output()
    assert not workdir.exists()


@pytest.fixture
def others(monkeypatch):
    """others(*values): the values of two other processes, returned when processes exchange
    theirs."""

    def gather(mine):
        assert mine.dtype == np.uint8  # JAX would turn integers into float32
        return np.stack([np.asarray(x, np.float64).view(np.uint8) for x in rows] + [mine])

    rows = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    return rows.extend


def test_largest_is_taken_across_processes(others):
    others([(1.0, 2**48 - 1, -3.0), (0.0, 7.0, -2.0)])
    found = hosts.largest(0.5, 2**48 - 3, -1.0)
    assert (found.dtype, found.tolist()) == (np.float64, [1.0, 2**48 - 1, -1.0])


def test_single_process_gets_its_own_values():
    assert hosts.largest(True, 2**48 - 1).tolist() == [1.0, 2**48 - 1]
    assert not hosts.any_process(False)
    assert hosts.send({"a": (1, None)}) == {"a": [1, None]}
    assert hosts.decide(lambda: "a") == "a"


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("value", [None, 0.1, "é" * 300, {"a": [1, {"b": True}]}])
def test_value_of_one_process_reaches_all(value, source, monkeypatch):
    given = ["other", "other"]
    given[source] = value
    sent = [functools.partial(hosts.send, one, source=source) for one in given]
    assert together(monkeypatch, *sent) == [value, value]


def test_first_process_decides_for_all(monkeypatch):
    def unused():
        raise AssertionError("only process 0 chooses")

    found = together(monkeypatch, *(functools.partial(hosts.decide, x) for x in (list, unused)))
    assert found == [[], []]

    def fail():
        raise OSError("no such file")

    first, second = together(
        monkeypatch, *(functools.partial(hosts.decide, x) for x in (fail, unused))
    )
    assert isinstance(first, OSError) and str(first) == "no such file"
    assert isinstance(second, ValueError) and "process 0" in str(second)


@pytest.mark.parametrize(("theirs", "same"), [("ab", True), ("ac", False)])
def test_mismatch_between_processes_is_reported(others, theirs, same):
    checksum = zlib.crc32(theirs.encode())
    others([(checksum, -checksum)])
    context = (
        contextlib.nullcontext()
        if same
        else pytest.raises(ValueError, match="the texts is not the same")
    )
    with context:
        hosts.require_same("the texts", "a", b"b")


def test_stop_polls_are_numbered_and_the_answer_persists(monkeypatch):
    monkeypatch.setattr(hosts, "_stopping", False)
    monkeypatch.setattr(hosts, "_polls", 0)
    asked = []

    def reached(number):
        asked.append(number)
        return number == 3

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(hosts.multihost_utils, "reached_preemption_sync_point", reached)
    for _ in range(2):
        hosts.check()
    for _ in range(2):
        with pytest.raises(signals.Stopped):
            hosts.check()
    assert asked == [1, 2, 3]


def test_single_process_stops_on_request(monkeypatch):
    monkeypatch.setattr(hosts, "_stopping", False)
    monkeypatch.setattr(signals, "requested", lambda: False)
    hosts.check()
    monkeypatch.setattr(signals, "requested", lambda: True)
    with pytest.raises(signals.Stopped):
        hosts.check()
