"""Reads in worker processes: the same results in the same order as in this process, only sooner.

Threads do not help: image libraries release the GIL in some calls, but too much of the work is
outside of these. The processes are grain's; examples come back through pieces.py.
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

PIECE = 16  # most positions per message in a queue
AHEAD = 2  # batches waiting in the workers' queues; grain buffers as many again


def read_in_order(
    read: Read, positions: range, *, batch: int, workers: int = 0
) -> Iterator[Outcome]:
    """Yields read(position) for each position in order.

    `workers` processes read some batches ahead; 0 reads in this process. They start with the first
    outcome and end with the iterator or this process.

    Args:
      read: maps a position to an example or BadExample; with workers it must be picklable. Its
        exceptions are raised here when their turn comes, and end the iterator.
      positions: the positions to read, in order.
      batch: number of outcomes that the caller needs at once.
      workers: number of processes.
    """
    if not workers:
        yield from map(read, positions)
        return
    if not flags.FLAGS.is_parsed():  # grain reads its own absl flags, even outside `app.run`
        flags.FLAGS.mark_as_parsed()
    piece = max(1, min(PIECE, batch // workers))
    waiting = -(-AHEAD * batch // (piece * workers))
    data = grain.MapDataset.range(positions.start, positions.stop, positions.step)
    # For each worker, grain buffers as many pieces as may wait in its queue. Three more are in
    # flight: one between queue and buffer, one being made and one being copied out. With that many
    # slots, one is always free.
    names, slots = f"pieces-{secrets.token_hex(8)}", 2 * waiting + 3
    data = data.map(read).batch(piece, batch_fn=Sender(names, slots))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=waiting)
    # A worker keeps one core busy by itself, so it reads without threads.
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
            f"Read in config.data.workers={workers} processes. If one was terminated, memory or "
            "(exit code -7) shared memory may have run out: lower config.data.workers or "
            "config.optim.batch, or enlarge /dev/shm (docker run --shm-size=8g). If something "
            "cannot be pickled, it cannot be sent to them: set config.data.workers=0."
        )
        raise
    finally:
        try:
            stream.close()
        finally:
            receive.close()


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Blocks signals in this thread and in the processes that it starts.

    Until these processes have run `_settle`, Ctrl-C would end each of them with a traceback. Other
    threads of this process still receive the signals.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _settle(worker: int, workers: int) -> None:
    """Sets up a worker process."""
    # Requests to stop are for the training process, which saves first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Keeps a transform that uses jax from reserving an accelerator.
    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
