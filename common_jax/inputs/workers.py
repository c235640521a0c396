"""Reading in processes: the same results in the same order as reading here, only sooner.

Threads do not help: between the calls of an image library that let go of the interpreter's lock
there is enough that does not. So a *nursery*, a fresh interpreter, unpickles what is to be read
once and forks the workers, which thereby share it. They do not see JAX's threads and devices, nor
is the main script run again. Examples come back through shared memory.

A worker ends when its connection does, so none outlives this process, however it dies.
"""

import dataclasses
import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np

from common_jax.inputs.examples import BadExample, Example

Outcome = Example | BadExample
Read = Callable[[int], Outcome]

AHEAD = 3  # batches in memory: one being handed out, two being read
ALIGNMENT = 64
PATIENCE = 10.0  # seconds for workers to end by themselves
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from common_jax.inputs.workers import nurse; nurse(json.loads(sys.argv[2]))"
)
# One core a worker; and whatever a transform does, it must not take hold of an accelerator.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Reading(Protocol):
    """The outcomes of read(start), read(start + 1) and so on, to be taken in order."""

    def take(self, count: int) -> list[Outcome]:
        """The next `count`; their arrays are valid until the next call."""
        ...

    def close(self) -> None: ...


def reading(read: Read, *, start: int, stop: int, most: int, workers: int) -> Reading:
    """Reads positions `start` to `stop` - 1, ahead of what is taken, in `workers` processes; with 0
    of them here, when taken.

    Args:
      read: position -> example or BadExample; for processes it must be picklable, and what it
        raises is raised by `take` when its turn comes.
      most: examples that are taken at once, at most.

    Raises:
      ValueError: `read` cannot be pickled.
      OSError: no memory to share.
    """
    if not workers:
        return _Here(read, start)
    return _Processes(read, start=start, stop=stop, most=most, workers=workers)


@dataclasses.dataclass
class _Here:
    read: Read
    next: int

    def take(self, count: int) -> list[Outcome]:
        first, self.next = self.next, self.next + count
        return [self.read(position) for position in range(first, self.next)]

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The shared memory: `slots` pieces of `size` bytes, used in turns from position `start` on."""

    start: int
    slots: int
    size: int

    def offset(self, position: int) -> int:
        return (position - self.start) % self.slots * self.size


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array that lies in the memory."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def view(self, memory: mmap.mmap) -> np.ndarray:
        return np.ndarray(self.shape, self.dtype, buffer=memory, offset=self.offset)


@dataclasses.dataclass(frozen=True)
class _Failure:
    """What `read` raised, and where."""

    error: Exception
    trace: str

    def again(self) -> Exception:
        self.error.add_note(f"In a worker process of config.data.workers:\n{self.trace}")
        return self.error


class _Processes:
    def __init__(self, read: Read, *, start: int, stop: int, most: int, workers: int):
        size = _bytes_needed(read, range(start, min(start + most, stop)))
        self._layout = _Layout(start, AHEAD * most, size)
        self._chunk = max(1, min(16, most // (4 * workers)))
        self._stop = stop
        self._sent = self._given = start  # the first position not yet sent out, handed out
        self._done: dict[int, Any] = {}
        job = _pickled((read, self._layout))
        with _shared_file(max(1, self._layout.slots * size)) as file:
            self._memory = mmap.mmap(file.fileno(), 0)
            pairs = [Pipe() for _ in range(workers)]
            self._tasks = {ours: 0 for ours, _ in pairs}  # how many chunks each has to do
            theirs = [connection.fileno() for _, connection in pairs]
            command = [sys.executable, "-c", BOOT, json.dumps(sys.path)]
            self._nursery = subprocess.Popen(
                [*command, json.dumps({"memory": file.fileno(), "connections": theirs})],
                stdin=subprocess.PIPE,
                pass_fds=(file.fileno(), *theirs),
                env=os.environ | ENVIRONMENT,
                start_new_session=True,  # so that Ctrl-C reaches the training alone
            )
            for _, connection in pairs:
                connection.close()
        try:
            self._nursery.stdin.write(job)
            self._nursery.stdin.close()
        except BrokenPipeError:
            pass  # it has died, as the first `take` will find

    def take(self, count: int) -> list[Outcome]:
        # All that was handed out before is used by now, so its slots are free.
        free = self._given + self._layout.slots
        outcomes = []
        for position in range(self._given, self._given + count):
            self._send(free)
            while position not in self._done:
                self._receive()
            outcomes.append(self._unpack(self._done.pop(position)))
        self._given += count
        return outcomes

    def close(self) -> None:
        for connection in self._tasks:
            connection.close()
        try:
            self._nursery.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._nursery.pid, signal.SIGKILL)
            self._nursery.wait()

    def _send(self, free: int) -> None:
        """Hands out what there are slots for, each chunk to who has least to do."""
        while self._sent < min(free, self._stop):
            last = min(self._sent + self._chunk, free, self._stop)
            connection = min(self._tasks, key=self._tasks.get)
            try:
                connection.send((self._sent, last))
            except OSError:
                raise self._death() from None
            self._tasks[connection] += 1
            self._sent = last

    def _receive(self) -> None:
        for connection in wait(list(self._tasks)):
            try:
                first, results = connection.recv()
            except (EOFError, OSError):
                raise self._death() from None
            if isinstance(results, _Failure):  # of the nursery
                raise results.again()
            self._tasks[connection] -= 1
            self._done |= {first + place: result for place, result in enumerate(results)}

    def _unpack(self, result: Any) -> Outcome:
        if isinstance(result, _Failure):
            raise result.again()
        if isinstance(result, BadExample):
            return result
        return {
            name: value.view(self._memory) if isinstance(value, _Stored) else value
            for name, value in result.items()
        }

    def _death(self) -> RuntimeError:
        return RuntimeError(
            "a worker process ended unexpectedly; if it says nothing above, the system may have "
            "killed it for want of memory: lower config.data.workers or config.optim.batch"
        )


def _bytes_needed(read: Read, positions: range) -> int:
    """The size of a slot, from the first good example; larger examples find another way."""
    for position in positions:
        example = read(position)
        if not isinstance(example, BadExample):
            sizes = [value.nbytes for value in example.values() if np.ndim(value)]
            return sum(_aligned(size) for size in sizes)
    return 0


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pickled(job: object) -> bytes:
    try:
        return pickle.dumps(job, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the data cannot be sent to worker processes ({error}): a source and its transform "
            "must be picklable, of classes and functions that a module defines; or set "
            "config.data.workers=0"
        ) from error


def _shared_file(size: int):
    """A file without a name, in memory if there is room for all of it."""
    problem = None
    for folder in ("/dev/shm", tempfile.gettempdir()):
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            problem = error
            continue
        try:
            # Pages that turn out not to be there when they are written would kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return file
        except OSError as error:
            file.close()
            problem = error
    raise OSError(
        f"no room for the {size / 2**20:.0f} MiB that config.data.workers share: {problem}; free "
        "/dev/shm or the folder of TMPDIR, lower config.optim.batch, or set config.data.workers=0"
    )


def nurse(handles: dict[str, Any]) -> None:
    """The nursery: forks a worker for every connection and waits for all of them.

    Args:
      handles: file descriptors, "memory" and "connections"; what to do comes on standard input.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a preemption: training wants to save first
    connections = [Connection(handle) for handle in handles["connections"]]
    try:
        read, layout = pickle.loads(sys.stdin.buffer.read())
        memory = mmap.mmap(handles["memory"], 0)
    except Exception as error:
        connections[0].send((0, _failure(error)))
        return
    children = []
    for connection in connections:
        child = os.fork()
        if child == 0:
            for other in connections:
                if other is not connection:
                    other.close()
            _work(connection, read, layout=layout, memory=memory)
            os._exit(0)
        children.append(child)
    for connection in connections:
        connection.close()
    for child in children:
        os.waitpid(child, 0)
    os._exit(0)  # taking down what was imported for the workers takes longer than they did


def _work(connection: Connection, read: Read, *, layout: _Layout, memory: mmap.mmap) -> None:
    """Reads what it is told, until the connection ends."""
    try:
        while True:
            first, last = connection.recv()
            results = [_result(read, at, layout, memory) for at in range(first, last)]
            connection.send((first, results))
    except (EOFError, OSError):
        return


def _result(read: Read, position: int, layout: _Layout, memory: mmap.mmap) -> Any:
    try:
        outcome = read(position)
    except Exception as error:
        return _failure(error)
    if isinstance(outcome, BadExample):
        return outcome
    offset = layout.offset(position)
    return dict(_store(outcome, memory, offset, end=offset + layout.size))


def _store(
    example: Example, memory: mmap.mmap, offset: int, *, end: int
) -> Iterator[tuple[str, Any]]:
    """Puts arrays into the memory as long as there is room; the rest stays as it is."""
    for name, value in example.items():
        if np.ndim(value) and not value.dtype.hasobject and offset + value.nbytes <= end:
            stored = _Stored(value.dtype, value.shape, offset)
            stored.view(memory)[...] = value
            offset += _aligned(value.nbytes)
            value = stored
        yield name, value


def _failure(error: Exception) -> _Failure:
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return _Failure(error, trace)
