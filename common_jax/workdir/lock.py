"""The lock of a workdir, so that one run at a time writes there.

The lock is a file that only one process can create. It names its holder, and a thread of the holder
touches it every few seconds. A holder on the same machine can be looked up, and its lock is stale
as soon as the process has ended; that of any other when the file has not been touched for `STALE`
seconds, by the clock of the file system, which is the same for all machines.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

import jax
from etils import epath

from common_jax import hosts, signals
from common_jax.workdir.files import temporary_beside

NAME = "run.lock"
BEAT = 10.0  # seconds between two touches
STALE = 90.0  # seconds without a touch after which a lock is stale
LOOK = 1.0  # seconds between two looks at a lock whose holder cannot be looked up

# The locks that this process holds, by the absolute path of the workdir; None for one that the
# first of several processes holds for all.
_held: dict[str, "_Hold | None"] = {}


class Locked(OSError):
    """Another process writes in the workdir."""


class LockLost(OSError):
    """The lock of this run now belongs to another process, or was deleted."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The holder of a lock, and the content of its file.

    Attributes:
      host: its name.
      machine: differs between machines, their boots and containers.
      pid: the process.
      started: when the process was started, in the kernel's ticks; None where that is unknown.
      since: when it got the lock, in a form for people.
      token: random, different for every lock.
    """

    host: str
    machine: str
    pid: int
    started: int | None
    since: str
    token: str

    @classmethod
    def this(cls) -> "Holder":
        """This process, from now on."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            since=datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            token=secrets.token_hex(16),
        )

    @property
    def alive(self) -> bool | None:
        """Whether the process still runs; None if it is on another machine or in a container."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it runs, as another user
            pass
        return self.started is None or self.started == _start_of(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def hold(workdir: epath.PathLike) -> Iterator[None]:
    """Holds the lock of a workdir. The folder is created if it is missing, and removed again if
    nothing was written. A process that holds the lock may hold it again.

    Of several processes that are one run, the first holds it for all; they call this at the same
    place. A disk on which no lock can be written is no error here, since a finished run needs none:
    `require` then raises the system's error. A bucket has no locks, which a warning says.

    Raises:
      Locked: when another process holds it, naming host, process and time; in all processes.
    """
    path, lock = _key(workdir), None
    if path in _held:
        yield
        return
    try:
        with signals.deferred():  # so that no lock stays when a signal comes in between
            lock = _acquire(path)
            _held[path] = lock
        yield
    finally:
        _held.pop(path, None)
        if lock is not None:
            lock.release()


def _acquire(path: str) -> "_Hold | None":
    """The lock of a workdir; None in all but the first of several processes. Raises Locked in all
    where the first finds that another process holds it."""
    lock = refusal = None
    several = jax.distributed.is_initialized()  # asking jax otherwise would start its devices
    if not several or jax.process_index() == 0:
        try:
            lock = _Hold.of(path)
        except Locked as error:
            refusal = error
    if several and hosts.agree(refusal is not None).any():
        refusal = refusal or Locked(f"{path} is in use by another run; process 0 says whose")
    if refusal is not None:
        raise refusal
    return lock


def require(workdir: epath.PathLike) -> None:
    """Makes sure that this process may write in a workdir whose lock it holds. To be called before
    anything is written that another run could mix with; without `hold` around it does nothing.

    Raises:
      LockLost: when another process has taken the lock over, or it was deleted.
      OSError: when the lock could not be written.
    """
    if (lock := _held.get(_key(workdir))) is not None:
        lock.require()


class _Hold:
    """A lock that this process holds, or could not write."""

    def __init__(self, path: pathlib.Path | None):
        self._path, self._made = path, []
        self._holder, self._failure = Holder.this(), None
        self._released = threading.Event()

    @classmethod
    def of(cls, workdir: str) -> "_Hold":
        """Takes the lock of a workdir; raises Locked."""
        if "://" in workdir:
            if not any(workdir.startswith(f"{other}/") for other in _held):
                logging.warning(
                    "%s has no locks: make sure that no other process writes there", workdir
                )
            return cls(None)
        lock = cls(pathlib.Path(workdir) / NAME)
        try:
            try:
                lock._make_folders()
                lock._take()
            except FileNotFoundError:  # removed in between, by a start that was refused
                lock._make_folders()
                lock._take()
        except Locked:
            raise
        except OSError as error:
            lock._failure = error
            lock._remove_folders()
            return lock
        threading.Thread(target=lock._beat, name="lock", daemon=True).start()
        return lock

    def require(self) -> None:
        if self._failure is not None:
            error = self._failure
            raise OSError(error.errno, f"no lock can be written: {error.strerror}", str(self._path))
        if self._path is None:
            return
        holder = _read(self._path)
        if holder is not None and holder.token == self._holder.token:
            return
        what = (
            f"{self._path.parent} was taken over by {holder}"
            if holder is not None
            else f"{self._path} was deleted, or its folder was"
        )
        raise LockLost(
            f"{what}, while this run was writing there: it stops, so that two runs do not mix. "
            "Start the same command again when no other one runs"
        )

    def release(self) -> None:
        """Removes the lock, unless it is another process's by now, and folders that it made and
        that are still empty."""
        self._released.set()
        if self._path is None or self._failure is not None:
            return
        with contextlib.suppress(OSError):
            holder = _read(self._path)
            if holder is not None and holder.token == self._holder.token:
                self._path.unlink()
        self._remove_folders()

    def _make_folders(self) -> None:
        folder = self._path.parent
        for parent in reversed([folder, *folder.parents]):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                self._made.append(parent)

    def _remove_folders(self) -> None:
        with contextlib.suppress(OSError):  # those that are not empty
            for folder in reversed(dict.fromkeys(self._made)):
                folder.rmdir()

    def _take(self) -> None:
        content = json.dumps(dataclasses.asdict(self._holder), indent=2) + "\n"
        watched = None  # holder and time of the last touch, of one that cannot be looked up
        while True:
            with contextlib.suppress(FileExistsError):
                self._create(content)
                return
            try:
                touched, holder = self._path.stat().st_mtime, _read(self._path)
                age = self._now() - touched
            except FileNotFoundError:  # released in between
                continue
            alive = None if holder is None else holder.alive
            if alive is False or (alive is None and age > STALE):
                self._take_over(holder, age)
                continue
            name = "a process that has just started" if holder is None else str(holder)
            if alive or (watched is not None and watched != (holder, touched)):
                raise Locked(
                    f"{self._path.parent} is in use by {name}: wait until it ends, stop it, or "
                    "give another --workdir"
                )
            if watched is None:
                watched = holder, touched
                logging.warning(
                    "%s was last used by %s; waiting up to %.0f s to see whether it still runs",
                    self._path.parent,
                    name,
                    STALE - age,
                )
            time.sleep(LOOK)
            if signals.requested() and not jax.distributed.is_initialized():
                raise signals.Stopped

    def _create(self, content: str) -> None:
        with open(self._path, "x") as file:
            try:
                file.write(content)
                file.flush()
            except OSError:
                self._path.unlink()
                raise

    def _take_over(self, holder: Holder | None, age: float) -> None:
        """Removes a stale lock; of several processes that try, one succeeds. A slow one may have
        moved the new lock of a quick one, and puts it back."""
        aside = pathlib.Path(temporary_beside(self._path))
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) != holder:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self._path)
            aside.unlink()
            return
        aside.unlink()
        logging.warning(
            "%s: taking over the lock of %s, which no longer runs (last sign of life %.0f s ago)",
            self._path.parent,
            holder or "an unknown process",
            age,
        )

    def _now(self) -> float:
        """The time by the file system's clock."""
        probe = pathlib.Path(temporary_beside(self._path))
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            # A failure here is reported by the next `require`.
            with contextlib.suppress(OSError):
                self.require()
                os.utime(self._path)


def _read(path: pathlib.Path) -> Holder | None:
    """The holder of a lock; None for a file that does not exist, or is not (yet) of this form."""
    try:
        holder = Holder(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    numbered = isinstance(holder.pid, int) and 0 < holder.pid < 2**31
    return holder if numbered else None


def _key(workdir: epath.PathLike) -> str:
    return str(workdir) if "://" in str(workdir) else os.path.realpath(os.path.expanduser(workdir))


def _machine() -> str:
    """A name that two processes share if one can look up the other by its number."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(pid: int) -> int | None:
    """When a process was started, which tells it from an earlier one of the same number; None for
    one that has ended and whose status has not been read."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *numbers = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(numbers[18])
