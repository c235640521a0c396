"""How the processes of a run start: how long they wait for each other, which GPUs each one uses."""

import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from jax._src.clusters import ClusterEnv
from processes import ROOT

from common_jax import hosts

ALONE = """
import logging, sys
from common_jax import hosts, signals

logging.basicConfig(level=logging.INFO, format="%(message)s")
hosts.WAIT = int(sys.argv[2])
with signals.listening():
    try:
        hosts.start(coordinator=sys.argv[1], processes=2, process=0)
    except signals.Stopped:
        sys.exit(signals.status())
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
    """alone(wait): starts process 0 of two, without the other one."""

    def start(wait: int) -> subprocess.Popen:
        command = [sys.executable, "-c", ALONE, f"127.0.0.1:{port}", str(wait)]
        started.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        return started[0]

    started = []
    yield start
    for process in started:
        process.kill()
        process.wait()


def test_signal_ends_a_process_that_waits_for_others(port, alone):
    process = alone(300)
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None
            time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=100)[1]  # jax waits for 300 s, and then aborts
    assert process.returncode == 0, said
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
        impatient.setattr(hosts, "WAIT", 0)
        hosts.start(coordinator=address, processes=2, process=1)
    with socket.socket() as coordinator:
        coordinator.bind(("127.0.0.1", port))
        coordinator.listen()
        assert not calls
        hosts.start(coordinator=address, processes=2, process=1)
    assert calls == [(address, 2, 1)]


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
    hosts.start()
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
    monkeypatch.setattr(hosts.glob, "glob", lambda _: [f"/dev/nvidia{i}" for i in range(8)])
    hosts.start(coordinator="a:1", processes=2, process=0)
    assert (f"uses {used} of the 8 GPUs that it is shown" in caplog.text) == warns
