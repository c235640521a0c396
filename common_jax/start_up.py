"""The start of a run's processes: they find each other, connect, and divide their node's GPUs."""

import glob
import importlib.util
import logging
import os
import re
import socket
import sys
import threading
import time

import jax

from common_jax import signals

# Seconds without a heartbeat after which a process counts as dead and all others stop.
HEARTBEAT = 30
WAIT = 300  # seconds to wait for process 0 at the start, and again for all processes
CHECKS = (
    "check that process 0 runs at this address, that the port is free there, and that no firewall "
    "blocks it"
)
LOCAL_IDS = "JAX_LOCAL_DEVICE_IDS"  # numbers of this process's GPUs, where a user chooses them


def connect(
    hosts: str = "auto",
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Connects this process to the others of its run. Call it before anything touches a device.

    Waits up to WAIT seconds for process 0 at `coordinator`, and as long again until all processes
    are connected. If one is still missing then, this process ends with a message and status 2: it
    waits outside Python, where nothing can be raised. (On TPUs jax ends the wait, by an abort.) A
    request to stop ends it at once.

    Args:
      hosts: "auto" connects if the environment describes several processes (a TPU VM, SLURM's
        srun, Open MPI), "all" connects or fails, "one" never connects.
      coordinator: HOST:PORT of process 0, if the environment does not provide it.
      processes: total number of processes.
      process: index of this process, from 0.

    Raises:
      ValueError: if only some of the last three are given, they contradict each other, or "all"
        finds no other process.
      ConnectionError: if process 0 does not answer at the given address, or jax cannot connect.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if hosts not in ("auto", "all", "one"):
        raise ValueError(f"--hosts={hosts!r} must be auto, all or one")
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)} missing: give --coordinator, --processes and --process "
            "together, or none of them if the cluster provides them"
        )
    explicit = not missing
    if explicit and hosts == "one":
        raise ValueError("--hosts=one contradicts --coordinator; leave one of them out")
    if explicit and not 0 <= process < processes:
        raise ValueError(
            f"--process={process} must be at least 0 and below --processes={processes}"
        )
    if explicit and not _is_address(coordinator):
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.1:8476")
    several = explicit or (hosts != "one" and cluster() is not None)
    if hosts == "all" and not several:
        raise ValueError(
            "--hosts=all finds neither a TPU VM nor several tasks of SLURM or Open MPI; give "
            "--coordinator=HOST:PORT, --processes=N and --process=I"
        )
    if not several:
        return
    kind = None if explicit else cluster()
    place = f"--coordinator={coordinator}" if explicit else f"the coordinator of {kind}"
    own = f"process {process} of {processes}" if explicit else "this process"
    others = f"others at {coordinator}" if explicit else f"other tasks of {kind}"
    if kind != "TPU":  # where a single host, too, gets here, and has no others
        logging.info("%s waits for the %s, up to %d minutes", own, others, WAIT // 60)
    if explicit and process > 0:
        _reach(coordinator)
    overdue = threading.Timer(WAIT, _give_up, (place,))
    overdue.daemon = True
    try:
        with signals.connecting():
            if kind != "TPU":
                overdue.start()
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                local_device_ids=_device_ids(),
                # jax aborts the process when its own wait is over.
                initialization_timeout=WAIT if kind == "TPU" else 2 * WAIT,
                heartbeat_timeout_seconds=HEARTBEAT,
            )
    except RuntimeError as error:
        raise ConnectionError(
            f"{place}: the processes cannot be connected ({error}); {CHECKS}"
        ) from error
    finally:
        overdue.cancel()
    logging.info(
        "process %d of %d, with %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )
    _warn_of_idle_gpus()
    if jax.process_index() > 0:  # process 0 logs for all; warnings and errors still show
        logging.getLogger().setLevel(logging.WARNING)


def _reach(coordinator: str) -> None:
    """Waits until process 0 accepts connections at this address; raises ConnectionError if it does
    not within WAIT seconds. Unlike jax's own wait, this can be interrupted."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + WAIT
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"--coordinator={coordinator}: process 0 has not answered within {WAIT} s "
                    f"({error}); {CHECKS}"
                ) from error
        time.sleep(0.5)


def _give_up(place: str) -> None:
    """Ends this process, whose main thread waits for the others outside Python."""
    print(
        f"error: {place}: not all processes have connected within {WAIT} s; check that all of them "
        "have been started, and the output of those that have ended",
        file=sys.stderr,
    )
    logging.shutdown()
    sys.stderr.flush()
    os._exit(2)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 1 <= int(port) < 2**16


def cluster() -> str | None:
    """The kind of cluster whose environment describes this run's processes; None if there is none.

    A single-host TPU VM counts too: only its metadata server knows what it is part of.
    """
    tasks = {
        "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),  # set by srun, not by sbatch
        "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri"),
    }
    for name, variables in tasks.items():
        if all(v in os.environ for v in variables) and int(os.environ[variables[0]]) > 1:
            return name
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if chips and importlib.util.find_spec("libtpu") and platforms in ("", "tpu"):
        return "TPU"
    return None


def _device_ids() -> list[int] | None:
    """jax's argument `local_device_ids`, which only concerns GPUs: [] for all that this process is
    shown, None for jax's choice.

    jax chooses one GPU for each task of SLURM and Open MPI: the one with the number of the task on
    its node. That is right only if the node's tasks are all shown the same GPUs.
    """
    if LOCAL_IDS in os.environ:
        return None  # jax reads it
    tasks, shown = _tasks_on_node(), _gpus_shown()
    if tasks == 1:
        return []
    if shown is None:
        return None
    # Whether SLURM shows each task only its own GPUs, which are then numbered from 0.
    per_task = os.environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # such as a100:2
    own = shown == 1 or shown < (tasks or 1) or str(shown) == per_task
    return [] if own else None


def _tasks_on_node() -> int | None:
    """The number of tasks on this node; None outside SLURM and Open MPI."""
    # Open MPI first, as in jax: SLURM may have started its daemons, one on each node.
    if (size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")) is not None:
        return int(size)
    # Such as 8(x3),4: three nodes with eight tasks and one with four.
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(count) for count, nodes in parts for _ in range(int(nodes or 1))]
    node = int(os.environ.get("SLURM_NODEID", 0))
    return tasks[node] if node < len(tasks) else None


def _gpus_shown() -> int | None:
    """The number of NVIDIA GPUs that this process may use; None if it is not restricted."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else len([x for x in visible.split(",") if x.strip()])


def _warn_of_idle_gpus() -> None:
    """Warns if this node's processes use fewer GPUs than they are shown."""
    if jax.default_backend() != "gpu" or LOCAL_IDS in os.environ:
        return
    used, tasks, shown = jax.local_device_count(), _tasks_on_node() or 1, _gpus_shown()
    shown = len(glob.glob("/dev/nvidia[0-9]*")) if shown is None else shown
    if used * tasks < shown:
        logging.warning(
            "process %d uses %d of the %d GPUs that it is shown, with %d processes on its node: "
            "start one process per GPU or one per node, or set %s to the numbers of its GPUs",
            jax.process_index(),
            used,
            shown,
            tasks,
            LOCAL_IDS,
        )
