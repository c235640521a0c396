"""Reading in processes: the same results in the same order as in this process, only sooner.

Threads do not help: image libraries release the interpreter's lock in some calls, but too much of
the work is outside of these. The processes are grain's; examples return through pieces.py.
"""

import contextlib
import itertools
import multiprocessing
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator

import grain
import jax
from absl import flags

from common_jax.inputs.examples import Outcome
from common_jax.inputs.pieces import Receiver, Sender

Read = Callable[[int], Outcome]

PIECE = 16  # most positions that go through a queue together
AHEAD = 2  # batches that wait in the workers' queues; grain buffers as many again


def read_in_order(
    read: Read, positions: range, *, batch: int, workers: int = 0
) -> Iterator[Outcome]:
    """Yields read(position) for each position in order.

    `workers` processes read some batches ahead; 0 reads in this one. They start with the first
    outcome and end with the iterator, or with this process.

    Args:
      read: maps a position to an example or BadExample; with processes it must be picklable. Its
        exceptions are raised here when their turn comes, and end the iterator.
      positions: in order.
      batch: outcomes that the caller needs at once.
      workers: number of processes.
    """
    if not workers:
        yield from map(read, positions)
        return
    if not flags.FLAGS.is_parsed():  # outside absl's `app.run`: grain reads flags of its own
        flags.FLAGS.mark_as_parsed()
    piece = max(1, min(PIECE, batch // workers))
    waiting = -(-AHEAD * batch // (piece * workers))
    data = grain.MapDataset.range(positions.start, positions.stop, positions.step)
    # grain buffers as many pieces of a process as may wait in its queue. Three more are in flight,
    # one between the two, one being made and one being copied out: with so many slots, one is
    # always free.
    names, slots = f"pieces-{secrets.token_hex(8)}", 2 * waiting + 3
    data = data.map(read).batch(piece, batch_fn=Sender(names, slots))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=waiting)
    # A worker fills a core, so it reads without threads.
    ahead = data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    stream = iter(ahead.mp_prefetch(options, worker_init_fn=_settle))
    receive = Receiver(names, workers)
    try:
        with _blocked():
            first = next(stream, None)  # starts the processes
        for message in () if first is None else itertools.chain([first], stream):
            yield from receive(message)
    except Exception as error:
        error.add_note(
            f"Read in config.data.workers={workers} processes. If one was terminated, there may "
            "not be enough memory, or (exit code -7) not enough of it shared: lower "
            "config.data.workers or config.optim.batch, or enlarge /dev/shm (docker run "
            "--shm-size=8g). What cannot be pickled cannot be sent to them: set "
            "config.data.workers=0."
        )
        raise
    finally:
        try:
            stream.close()
        finally:
            receive.close()


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Blocks signals in this thread, and in processes that it starts.

    Until these processes run `_settle`, Ctrl-C would end each with a traceback. Other threads of
    this process still receive the signals.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _settle(worker: int, workers: int) -> None:
    """Prepares a worker process."""
    # Requests to stop are for the process that trains, which saves first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A transform that uses jax must not reserve an accelerator.
    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
