"""Several processes as one run: they find each other, agree, and stop together.

A request to stop (SIGTERM, as schedulers send it before they take a machine away, or another of
`common_jax.signals`) may reach only one process, at any time. All processes `check` at the same
places, once per step of training and once per batch of evaluation, and get the same answer there:
the run stops at a step on which all agree.
"""

import glob
import importlib.util
import logging
import os
import sys
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from common_jax import signals

# Seconds without a sign of life after which a process counts as dead and all others stop.
HEARTBEAT = 30

_polls = 0  # calls of `check` so far: the same number in every process at the same place
_stopping = False  # the answer was yes once, and remains yes


def start(
    hosts: str = "auto",
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Connects this process with the others of its run, before any device is looked at.

    Args:
      hosts: "auto" connects where the environment describes several processes (a TPU VM, SLURM's
        srun, Open MPI), "all" does so or fails, "one" never does.
      coordinator: HOST:PORT of process 0, where the environment does not say it.
      processes: how many there are.
      process: the number of this one, from 0.

    Raises:
      ValueError: when some of the last three are given and others are not, they contradict each
        other, or "all" finds no other process.
      RuntimeError: when the others cannot be reached.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if hosts not in ("auto", "all", "one"):
        raise ValueError(f"--hosts={hosts!r} must be auto, all or one")
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)} missing: give --coordinator, --processes and --process "
            "together, or none of them where the cluster tells"
        )
    explicit = not missing
    if explicit and hosts == "one":
        raise ValueError("--hosts=one contradicts --coordinator; leave one of them out")
    if explicit and not 0 <= process < processes:
        raise ValueError(
            f"--process={process} must be at least 0 and below --processes={processes}"
        )
    several = explicit or (hosts != "one" and cluster() is not None)
    if hosts == "all" and not several:
        raise ValueError(
            "--hosts=all finds neither a TPU VM nor several tasks of SLURM or Open MPI; give "
            "--coordinator=HOST:PORT, --processes=N and --process=I"
        )
    if not several:
        return
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT)
    logging.info(
        "process %d of %d, with %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )
    if jax.process_index() > 0:  # process 0 speaks for all; warnings and errors pass
        logging.getLogger().setLevel(logging.WARNING)


def cluster() -> str | None:
    """The kind of cluster whose environment describes the processes of this run; None for none.

    A single host of a TPU VM counts too: only its metadata server knows what it is part of.
    """
    tasks = {
        "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),  # of srun, not of a batch script
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


def check() -> None:
    """Raises `signals.Stopped` where all processes stop. All of them must call it equally often."""
    global _polls, _stopping
    _polls += 1
    if not _stopping:
        several = jax.distributed.is_initialized()
        asked = multihost_utils.reached_preemption_sync_point if several else _requested
        _stopping = asked(_polls)
    if _stopping:
        raise signals.Stopped


def agree(*values: float) -> np.ndarray:
    """The greatest of each value over all processes, the same in all of them; (values,) float64.

    All of them must call it at the same place.
    """
    mine = np.asarray(values, np.float64)
    if jax.process_count() == 1:
        return mine
    # As bytes: jax would turn float64 into float32.
    everyone = multihost_utils.process_allgather(mine.view(np.uint8))
    return np.ascontiguousarray(everyone).view(np.float64).max(axis=0)


def raise_everywhere(failure: Exception | None, elsewhere: Exception) -> None:
    """Raises in all processes if one has failed: its `failure` in that one, `elsewhere` in the
    others, which would wait for it forever. All of them must call it at the same place."""
    if agree(failure is not None).any():
        raise failure or elsewhere


def leave(status: int) -> NoReturn:
    """Ends this process. Where it is one of several and has failed, it does not wait for the
    others, which would wait for it: they notice within HEARTBEAT seconds that it is gone."""
    if jax.distributed.is_initialized() and status:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _requested(_: int) -> bool:
    return signals.requested()
