"""Several processes of one run, simulated by threads, so that a test can give each its own disk."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from common_jax import hosts

PATIENCE = 20  # maximum seconds that a process waits for another one


def together(patch: pytest.MonkeyPatch, *processes: Callable[[], Any]) -> list[Any]:
    """Calls every function as one process of a run; returns what each returned or raised.

    They exchange values as real processes do, in `common_jax.hosts`. One that waits for an exchange
    which another one never makes gets a BrokenBarrierError.
    """
    own, count = threading.local(), len(processes)
    values, barrier = [None] * count, threading.Barrier(count, timeout=PATIENCE)

    def exchange(value: Any) -> list[Any]:
        values[own.index] = value
        barrier.wait()
        everyone = list(values)
        barrier.wait()  # nobody may replace a value before all have read it
        return everyone

    def broadcast(value: Any, is_source: bool | None = None) -> Any:
        is_source = own.index == 0 if is_source is None else is_source
        given = exchange((is_source, value))
        assert len({np.shape(one) for _, one in given}) == 1
        return next(one for chosen, one in given if chosen)

    def call(index: int) -> Any:
        own.index = index
        try:
            return processes[index]()
        except Exception as error:
            return error

    patch.setattr(jax, "process_count", lambda: count)
    patch.setattr(jax, "process_index", lambda: own.index)
    patch.setattr(jax.distributed, "is_initialized", lambda: True)
    exchanges = hosts.multihost_utils
    patch.setattr(exchanges, "process_allgather", lambda value: np.stack(exchange(value)))
    patch.setattr(exchanges, "broadcast_one_to_all", broadcast)
    patch.setattr(exchanges, "sync_global_devices", exchange)
    with ThreadPoolExecutor(count) as pool:
        return [*pool.map(call, range(count))]
