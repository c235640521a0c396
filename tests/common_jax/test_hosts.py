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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"coordinator": "localhost:1"}, "--processes, --process missing"),
        ({"processes": 2, "process": 0}, "--coordinator missing"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "--process=2 must be"),
        *(
            ({"coordinator": text, "processes": 2, "process": 0}, f"={text} must be HOST:PORT")
            for text in ("localhost", "localhost:", ":8476", "localhost:abc", "localhost:65536")
        ),
        ({"hosts": "all"}, "finds neither a TPU VM nor several tasks"),
        (
            {"hosts": "one", "coordinator": "localhost:1", "processes": 2, "process": 1},
            "--hosts=one contradicts",
        ),
        ({"hosts": "some"}, "--hosts='some' must be auto, all or one"),
    ],
)
def test_invalid_connection_flags_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        hosts.start(**{"hosts": "auto"} | settings)


def test_unreachable_coordinator_is_a_user_error(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("UNKNOWN: Failed to start RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConnectionError, match=r"--coordinator=a:1: .*Failed to start RPC server"):
        hosts.start(coordinator="a:1", processes=2, process=0)


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}, "SLURM"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "node1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, None),  # in a batch script, before srun
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"},
            "Open MPI",
        ),
        ({}, None),
    ],
)
def test_cluster_is_detected_from_the_environment(variables, kind, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts.cluster() == kind


@pytest.mark.parametrize(
    ("chips", "libtpu", "platforms", "kind"),
    [
        (["/dev/accel0"], True, "", "TPU"),
        (["/dev/vfio/0"], True, "tpu", "TPU"),
        (["/dev/accel0"], True, "cpu", None),
        (["/dev/accel0"], False, "", None),
        ([], True, "", None),
    ],
)
def test_tpu_vm_needs_chips_it_may_use(chips, libtpu, platforms, kind, monkeypatch):
    found = lambda pattern: [x for x in chips if x.startswith(pattern[:8])]  # noqa: E731
    monkeypatch.setattr(hosts.glob, "glob", found)
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: libtpu or None)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert hosts.cluster() == kind


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


@pytest.mark.parametrize(
    ("settings", "found", "connects"),
    [
        ({}, None, False),
        ({}, "SLURM", True),
        ({"hosts": "one"}, "SLURM", False),
        ({"hosts": "all"}, "TPU", True),
        ({"coordinator": "a:1", "processes": 2, "process": 0}, None, True),
        ({"hosts": "all", "coordinator": "a:1", "processes": 2, "process": 1}, None, True),
    ],
)
def test_processes_connect_if_there_are_others(settings, found, connects, monkeypatch):
    calls = []
    monkeypatch.setattr(hosts, "cluster", lambda: found)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: calls.append((args, kw)))
    monkeypatch.setattr(hosts, "_reach", lambda coordinator: None)
    hosts.start(**settings)
    given = tuple(settings.get(name) for name in ("coordinator", "processes", "process"))
    named = {"local_device_ids": None, "heartbeat_timeout_seconds": 30}
    named["initialization_timeout"] = 300 if found == "TPU" and "process" not in settings else 600
    assert calls == [(given, named)] * connects
