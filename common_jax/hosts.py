"""Several processes as one run: they agree, and stop together. `common_jax.start_up` connects them.

A request to stop (SIGTERM, which schedulers send before they preempt a machine, or another signal
of `common_jax.signals`) may reach only one process, at any time. All processes call `check` at the
same points, once per training step and once per evaluation batch, and get the same answer there, so
the run stops at a step that all of them agree on.
"""

import collections
import contextlib
import json
import logging
import os
import sys
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # its client has no public name
from jax.experimental import multihost_utils

from common_jax import signals

# Seconds for which a process that has failed waits for others that fail too.
LEAVING = 2

_polls = 0  # calls of `check` so far; the same in every process at the same point
_stopping = False  # once true, it stays true


class Disagreement(ValueError):
    """The processes of a run do not fit each other. Raised in all of them, which end together."""


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


def require_same_devices() -> None:
    """Raises Disagreement, in all processes, if they have different numbers of devices. Call this
    before any exchange, which needs the same number everywhere; it exchanges nothing itself."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    for process, count in sorted(counts.items()):
        if count != counts[0]:
            raise Disagreement(
                f"process 0 has {counts[0]} of all {counts.total()} devices, and process {process} "
                f"has {count}; all must have the same number: look for a device that does not "
                "start, or choose them with JAX_LOCAL_DEVICE_IDS or CUDA_VISIBLE_DEVICES"
            )


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
    others, which would deadlock: they notice within `start_up.HEARTBEAT` seconds that it is gone.
    If all have failed for the same reason, none exits before the others have printed theirs."""
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
