"""One of two processes that save a state together, while parts of some saves fail.

Prints `finished STEPS` at the end.
"""

import argparse
import contextlib
import logging
import resource
import signal
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common_jax import hosts, start_up
from common_jax.checkpoint import Checkpoints, SaveError, finished_steps, writing
from common_jax.state import TrainState


def main() -> None:
    """Saves steps 1 to 6. Process 1 cannot write its part of steps 2 and 6, and process 0 finds
    step 4 damaged."""
    parser = argparse.ArgumentParser()
    for name, kind in (("workdir", str), ("coordinator", str), ("processes", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--process", type=int, required=True)
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax's tracebacks
    start_up.connect(
        coordinator=given.coordinator, processes=given.processes, process=given.process
    )
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints = Checkpoints(given.workdir, keep=10, best=None, on_failed="go_on")
    make = _state()
    faults = {2: (1, _small_disk), 4: (0, _damage), 6: (1, _small_disk)}
    try:
        for step in range(1, 7):
            place, fault = faults.get(step, (None, None))
            with fault() if place == given.process else contextlib.nullcontext():
                checkpoints.save(make(step), step=step, config={}, metrics=None)
                if step == 6:
                    checkpoints.wait()
                else:
                    checkpoints._attempt(checkpoints._finish)  # what the next save begins with
    except SaveError as error:
        print(f"SaveError: {error}")
    print("finished", finished_steps(checkpoints.folder), flush=True)
    hosts.leave(2)


def _state():
    mesh = jax.make_mesh((jax.device_count(),), ("data",))

    def put(value: np.ndarray, *axes: str) -> jax.Array:
        sharding = NamedSharding(mesh, P(*axes))
        return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)

    noise = np.random.default_rng(0).normal(size=(8, 2**15)).astype(np.float32)
    large, zero = put(noise, "data"), put(np.zeros((), np.int32))

    def make(step: int) -> TrainState:
        return TrainState(
            step=put(np.asarray(step, np.int32)),
            params={"kernel": large},
            opt_state={},
            ema=None,
            sums={},
            skipped=zero,
            skipped_in_row=zero,
        )

    return make


@contextlib.contextmanager
def _small_disk() -> Iterator[None]:
    """Files of this process cannot become larger than 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """What this process reads back differs from what was written."""

    def fail(*_: object) -> None:
        raise OSError("its item 'params' is damaged")

    check, writing.check_written = writing.check_written, fail
    yield
    writing.check_written = check


if __name__ == "__main__":
    main()
