"""Several processes as one run: they connect, agree, and stop together.

A request to stop (SIGTERM, which schedulers send before they preempt a machine, or another signal
of `common_jax.signals`) may reach only one process, at any time. All processes call `check` at the
same points, once per training step and once per evaluation batch, and get the same answer there, so
the run stops at a step that all of them agree on.
"""

import contextlib
import glob
import importlib.util
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # its client has no public name
from jax.experimental import multihost_utils

from common_jax import signals

# Seconds without a heartbeat after which a process counts as dead and all others stop.
HEARTBEAT = 30
# Seconds for which a process that has failed waits for others that fail too.
LEAVING = 2
WAIT = 300  # seconds to wait for process 0 at the start, and again for all processes
CHECKS = (
    "check that process 0 runs at this address, that the port is free there, and that no firewall "
    "blocks it"
)
LOCAL_IDS = "JAX_LOCAL_DEVICE_IDS"  # numbers of this process's GPUs, where a user chooses them

_polls = 0  # calls of `check` so far; the same in every process at the same point
_stopping = False  # once true, it stays true


class Disagreement(ValueError):
    """The processes of a run do not fit each other. Raised in all of them, which end together."""


def start(
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


def check() -> None:
    """Raises `signals.Stopped` at the point where all processes stop. All processes must make the
    same sequence of calls."""
    global _polls, _stopping
    _polls += 1
    if not _stopping:
        several = jax.distributed.is_initialized()
        asked = multihost_utils.reached_preemption_sync_point if several else _requested
        _stopping = asked(_polls)
    if _stopping:
        raise signals.Stopped


def largest(*values: float) -> np.ndarray:
    """The maximum of each value over all processes; (values,) float64. All processes must call this
    at the same point."""
    mine = np.asarray(values, np.float64)
    if jax.process_count() == 1:
        return mine
    # As bytes: jax would convert float64 to float32.
    everyone = multihost_utils.process_allgather(mine.view(np.uint8))
    return np.ascontiguousarray(everyone).view(np.float64).max(axis=0)


def shard() -> tuple[int, int]:
    """(index of this process, number of processes): its share of every batch."""
    return jax.process_index(), jax.process_count()


def any_process(flag: bool) -> bool:
    """True in all processes if `flag` is true in any. All must call this at the same point."""
    return bool(largest(flag).any())


def barrier(name: str) -> None:
    """Waits until all processes are here; `name` is for the message if they are not."""
    multihost_utils.sync_global_devices(name)


def first_with(flag: bool) -> int | None:
    """The index of the first process whose `flag` is true; None if there is none. All processes
    must call this at the same point."""
    count = jax.process_count()
    nearest = int(largest(count - jax.process_index() if flag else 0)[0])
    return count - nearest if nearest else None


def send(value: Any, *, source: int = 0) -> Any:
    """The value of process `source`, in all processes, as it is read from JSON. All processes must
    call this at the same point; the values of the others are not used."""
    mine = jax.process_index() == source
    text = json.dumps(value).encode() if mine else b""
    if jax.process_count() > 1:
        # A power of two, since the exchange is compiled for every size; JSON may end in spaces.
        size = 1 << (int(largest(max(len(text), 64))[0]) - 1).bit_length()
        content = np.frombuffer(text.ljust(size), np.uint8)
        text = multihost_utils.broadcast_one_to_all(content, is_source=mine).tobytes()
    return json.loads(text)


def decide(choose: Callable[[], Any]) -> Any:
    """Process 0 calls `choose`, and all processes return its value, as it is read from JSON. All
    processes must call this at the same point.

    Use it for choices that depend on files which process 0 may have just written. The others may
    not see them yet, even after a barrier: clients of network storage cache folders for up to a
    minute.

    Raises:
      Exception: what `choose` raises, in process 0; a ValueError in the others.
    """
    value = failure = None
    if jax.process_index() == 0:
        try:
            value = choose()
        except Exception as error:
            failure = error
    raise_everywhere(failure, ValueError("process 0 has stopped the run, and says why"))
    return send(value)


def meet(name: str, seconds: float) -> None:
    """Waits until all processes have called this with `name`, which no other meeting may have.
    Unlike `barrier`, any thread may call it. Raises jax.errors.JaxRuntimeError after `seconds`."""
    distributed.global_state.client.wait_at_barrier(name, int(seconds * 1000))


def publish(name: str, text: str) -> None:
    """Makes a text available to all processes, unless one has published under this name before. Any
    thread may call it, at any time."""
    try:
        distributed.global_state.client.key_value_set(f"{name}/text", text)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def published(name: str) -> str | None:
    """The text that a process has published under this name; None if none has."""
    found = distributed.global_state.client.key_value_dir_get(f"{name}/")
    return found[0][1] if found else None


def require_same(what: str, *parts: bytes | memoryview | str) -> None:
    """Raises Disagreement in all processes unless the bytes of `parts` are the same in all of them.
    All processes must call this at the same point.

    Args:
      what: what is compared, for the message, such as "the training set".
      parts: compared by their checksum.
    """
    if jax.process_count() == 1:
        return
    own = 0
    for part in parts:
        own = zlib.crc32(part.encode() if isinstance(part, str) else part, own)
    highest, lowest = largest(own, -own) * (1, -1)
    if highest != lowest:
        raise Disagreement(
            f"{what} is not the same on all hosts (process {jax.process_index()} has checksum "
            f"{own:08x}): copy the same files to all of them, or share one folder"
        )


def raise_everywhere(failure: Exception | None, elsewhere: Exception) -> None:
    """Raises in all processes if one has failed: `failure` in that process, `elsewhere` in the
    others, which would otherwise wait for it forever. All processes must call this at the same
    point."""
    if any_process(failure is not None):
        raise failure or elsewhere


def leave(status: int) -> NoReturn:
    """Exits this process. If it is one of several and has failed, it exits without waiting for the
    others, which would deadlock: they notice within HEARTBEAT seconds that it is gone. If all have
    failed for the same reason, none exits before the others have printed theirs."""
    if jax.distributed.is_initialized() and status:
        # jax aborts the others as soon as process 0 is gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            meet("processes that failed", LEAVING)
        # A normal exit would run jax's shutdown, a barrier that all processes must reach.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _requested(_: int) -> bool:
    return signals.requested()
