"""How the processes of a run start: when they connect, how long they wait for each other, which
GPUs each one uses."""

import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from jax._src.clusters import ClusterEnv
from processes import ROOT

from common_jax import start_up

ALONE = """
import logging, sys
from common_jax import signals, start_up

logging.basicConfig(level=logging.INFO, format="%(message)s")
start_up.WAIT = int(sys.argv[2])
with signals.listening(resumes=len(sys.argv) < 4):
    try:
        start_up.connect(coordinator=sys.argv[1], processes=2, process=0)
    except signals.Stopped:
        sys.exit(signals.status())
"""

CONNECTED = """
import os, signal, sys, time
from common_jax import hosts, signals, start_up

with signals.listening():
    start_up.connect(coordinator=sys.argv[1], processes=1, process=0)
    with signals.deferred():
        try:
            for step in range(1000):
                hosts.check()
                if step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.02)
        except signals.Stopped:
            print("stops at a step", signals.requested(), signals.status(), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
"""

SPINS = """
import pathlib, sys
from common_jax import signals

with signals.listening(), signals.connecting():
    sys.setswitchinterval(0.3)
    pathlib.Path(sys.argv[1]).touch()
    while True:
        pass
"""


@pytest.fixture
def port():
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def alone(port):
    """alone(wait, *more): starts process 0 of two, without the other one. With a further argument
    it is a command that does not resume."""

    def start(wait: int, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", ALONE, f"127.0.0.1:{port}", str(wait), *more]
        started.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        return started[0]

    started = []
    yield start
    for process in started:
        process.kill()
        process.wait()


def test_signals_reach_a_connected_process(port):
    """jax handles SIGTERM itself, outside Python; the second one must still end the process."""
    command = [sys.executable, "-c", CONNECTED, f"127.0.0.1:{port}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert process.stdout == "stops at a step True 0\n", process.stderr
    assert process.returncode == 143
    said = [line for line in process.stderr.splitlines() if "ask" in line or "again" in line]
    assert said == ["asked to stop: saving at the next step", "SIGTERM again: ending at once"]


@pytest.mark.parametrize(("more", "status"), [((), 0), (("lost",), 143)])
def test_signal_ends_a_process_that_waits_for_others(port, alone, more, status):
    process = alone(300, *more)
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None
            time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=100)[1]  # jax waits for 300 s, and then aborts
    assert process.returncode == status, said
    assert f"process 0 of 2 waits for the others at 127.0.0.1:{port}, up to 5 minutes" in said
    assert "saving" not in said


def test_signal_between_two_lines_of_jax_ends_the_process_too(tmp_path):
    """The main thread handles the signal first: it runs Python, and gives way after 0.3 s."""
    command = [sys.executable, "-c", SPINS, tmp_path / "spins"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "spins").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 0, said
    assert said == "stopped as requested, before all processes were connected\n"


def test_wait_for_others_ends_with_a_message(port, alone):
    process = alone(1)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 2, said
    error = f"error: --coordinator=127.0.0.1:{port}: not all processes have connected within 1 s"
    assert error in said and "Check failure" not in said


def test_missing_coordinator_is_a_user_error(port, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: calls.append(args))
    calls, address = [], f"127.0.0.1:{port}"
    said = f"={address}: process 0 has not answered within 0 s"
    with monkeypatch.context() as impatient, pytest.raises(ConnectionError, match=said):
        impatient.setattr(start_up, "WAIT", 0)
        start_up.connect(coordinator=address, processes=2, process=1)
    with socket.socket() as coordinator:
        coordinator.bind(("127.0.0.1", port))
        coordinator.listen()
        assert not calls
        start_up.connect(coordinator=address, processes=2, process=1)
    assert calls == [(address, 2, 1)]


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
        start_up.connect(**{"hosts": "auto"} | settings)


def test_unreachable_coordinator_is_a_user_error(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("UNKNOWN: Failed to start RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConnectionError, match=r"--coordinator=a:1: .*Failed to start RPC server"):
        start_up.connect(coordinator="a:1", processes=2, process=0)


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
    assert start_up.cluster() == kind


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
    monkeypatch.setattr(start_up.glob, "glob", found)
    monkeypatch.setattr(start_up.importlib.util, "find_spec", lambda name: libtpu or None)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert start_up.cluster() == kind


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
    monkeypatch.setattr(start_up, "cluster", lambda: found)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: calls.append((args, kw)))
    monkeypatch.setattr(start_up, "_reach", lambda coordinator: None)
    start_up.connect(**settings)
    given = tuple(settings.get(name) for name in ("coordinator", "processes", "process"))
    named = {"local_device_ids": None, "heartbeat_timeout_seconds": 30}
    named["initialization_timeout"] = 300 if found == "TPU" and "process" not in settings else 600
    assert calls == [(given, named)] * connects


SLURM = {
    "SLURM_JOB_ID": "4321",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    ("variables", "ids"),
    [
        # One task per node: all GPUs, not only that of the task's number.
        (SLURM | EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, []),
        (SLURM | EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "2,1(x2)", "SLURM_NODEID": "2"}, []),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        # Several tasks that share the node's GPUs: jax's choice, one for each.
        (SLURM | EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_NODEID": "3"}, None),
        (SLURM | EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "1,8(x3)", "SLURM_NODEID": "1"}, None),
        (SLURM | EIGHT, None),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, None),
        # mpirun in a SLURM job, whose step has one daemon on each node.
        (
            OPEN_MPI
            | SLURM
            | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"},
            None,
        ),
        # Each task is shown its own GPUs, which are numbered from 0.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, []),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "4(x4)"}, []),
        (
            SLURM
            | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}
            | {"SLURM_GPUS_PER_TASK": "a100:2"},
            [],
        ),
        (OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, []),
        # The user's choice.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "JAX_LOCAL_DEVICE_IDS": "2,3"}, None),
    ],
)
def test_process_uses_the_gpus_that_it_is_shown(variables, ids, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: calls.append(kw))
    start_up.connect()
    assert [call.get("local_device_ids") for call in calls] == [ids]


@pytest.mark.parametrize("variables", [SLURM, OPEN_MPI])
@pytest.mark.parametrize(("given", "used"), [(None, [3]), ([], [])])
def test_jax_restricts_tasks_to_one_gpu_unless_told(variables, given, used, monkeypatch):
    """What the previous test relies on: [] is no restriction."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, given, None, 1)
    assert found[1:] == (4, 3, used)


@pytest.mark.parametrize(
    ("variables", "used", "warns"),
    [
        (EIGHT, 8, False),
        (EIGHT, 4, True),
        (EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "8"}, 1, False),
        (EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "2"}, 1, True),
        (EIGHT | {"JAX_LOCAL_DEVICE_IDS": "0"}, 1, False),
        ({}, 1, True),  # eight device files
    ],
)
def test_idle_gpus_are_warned_of(variables, used, warns, monkeypatch, caplog):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_device_count", lambda: used)
    monkeypatch.setattr(start_up.glob, "glob", lambda _: [f"/dev/nvidia{i}" for i in range(8)])
    start_up.connect(coordinator="a:1", processes=2, process=0)
    assert (f"uses {used} of the 8 GPUs that it is shown" in caplog.text) == warns
