"""One writer per workdir: the lock that a run holds while it writes there.

The lock is a file that only one process can create. It names its holder, and a thread of the holder
touches it every few seconds. A holder on the same machine can be looked up, and its lock is stale
as soon as the process has ended. Any other lock is stale when the file was not touched for `STALE`
seconds, by the clock of the file system, which is the same for all machines.
"""

import contextlib
import dataclasses
import datetime
import hashlib
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
LOOK = 1.0  # seconds between two checks of a lock whose holder cannot be looked up

# The locks of this process by the absolute path of the workdir; None in a bucket, and where the
# first of several processes holds the lock for this one.
_locks: dict[str, "_Lock | None"] = {}


class Locked(OSError):
    """Another process writes in the workdir."""


class LockLost(OSError):
    """This process has lost its lock to another one, or the lock was deleted."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock; the content of the lock's file."""

    host: str
    machine: str  # distinguishes machines, their boots and their containers
    pid: int
    started: int | None  # in the kernel's ticks; None if unknown
    since: str  # time of locking, for people
    token: str  # random, different for every lock

    @classmethod
    def this(cls) -> "Holder":
        """Describes this process, from now on."""
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
        """True if the process still runs; None if it belongs to another machine or container."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)  # signal 0 only asks whether the process exists
        except ProcessLookupError:
            return False
        except PermissionError:  # it runs, as another user
            pass
        # A pid is reused; together with the start it is unique until the next boot.
        return self.started is None or self.started == _start_of(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def hold(workdir: epath.PathLike) -> Iterator[None]:
    """Holds the lock of a workdir, which it creates if missing and removes again if it stays empty.

    A process may hold its own lock several times. If several processes are one run, the first holds
    the lock for all; they call this at the same place. A disk on which no lock can be written is
    not an error here, since a finished run needs none: `require` then raises the system's error. A
    bucket has no locks, and a warning says so.

    Raises:
      Locked: when another process holds it, naming host, process and time; in all processes.
    """
    path, lock = _key(workdir), None
    if path in _locks:
        yield
        return
    try:
        # A signal between the two lines would leave a lock that nothing releases.
        with signals.deferred():
            lock = _acquire(path)
            _locks[path] = lock
        yield
    finally:
        _locks.pop(path, None)
        if lock is not None:
            lock.release()


def _acquire(path: str) -> "_Lock | None":
    """Returns the lock of a workdir; None in a bucket, and in all but the first of several
    processes. Raises Locked in all of them where another process holds it."""
    lock = refusal = None
    several = jax.distributed.is_initialized()  # process_count() would start the devices
    if not several or jax.process_index() == 0:
        try:
            lock = _Lock.of(path)
        except Locked as error:
            refusal = error
    if several:
        elsewhere = Locked(f"{path} is in use by another run; process 0 says whose")
        hosts.raise_everywhere(refusal, elsewhere)
    if refusal is not None:
        raise refusal
    return lock


def require(workdir: epath.PathLike) -> None:
    """Checks that this process may still write in a workdir that it has locked, if it has. Call it
    before anything is written that could mix with another run's files.

    Raises:
      LockLost: when another process has taken over the lock, or it was deleted.
      OSError: when the lock could not be written.
    """
    if (lock := _locks.get(_key(workdir))) is not None:
        lock.require()


class _Lock:
    """A lock that this process holds, or could not write."""

    def __init__(self, path: pathlib.Path):
        self._path, self._new_folders = path, []
        self._holder, self._failure = Holder.this(), None
        self._released = threading.Event()

    @classmethod
    def of(cls, workdir: str) -> "_Lock | None":
        """Locks a workdir, unless it is in a bucket; raises Locked."""
        if "://" in workdir:
            # An object store creates no file exclusively. Warns once, not for every run below it.
            if not any(workdir.startswith(f"{other}/") for other in _locks):
                logging.warning(
                    "%s has no locks: make sure that no other process writes there", workdir
                )
            return None
        lock = cls(pathlib.Path(workdir) / NAME)
        try:
            try:
                lock._take()
            except FileNotFoundError:  # a refused start has removed its empty folders in between
                lock._take()
        except Locked:
            raise
        # Raised by `require` instead, since a finished run on a read-only disk needs no lock.
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
        # Compares tokens, not processes: another lock of the same process is not this one.
        holder = _read(self._path)
        if holder is not None and holder.token == self._holder.token:
            return
        event = (
            f"{self._path.parent} was taken over by {holder}"
            if holder is not None
            else f"{self._path} was deleted, or its folder was"
        )
        raise LockLost(
            f"{event}, while this run was writing there: it stops, so that two runs do not mix. "
            "Start the same command again when no other one runs"
        )

    def release(self) -> None:
        """Removes the lock, unless it now belongs to another process, and its own empty folders."""
        self._released.set()
        with contextlib.suppress(OSError):  # of a lock that is lost, or was never written
            self.require()
            self._path.unlink()
        self._remove_folders()

    def _remove_folders(self) -> None:
        with contextlib.suppress(OSError):  # folders that are not empty, and those above them
            for folder in reversed(dict.fromkeys(self._new_folders)):
                folder.rmdir()

    def _take(self) -> None:
        for folder in reversed(self._path.parents):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self._new_folders.append(folder)
        content = json.dumps(dataclasses.asdict(self._holder), indent=2) + "\n"
        # Holder and last touch of a lock whose holder cannot be looked up. Such a lock is waited
        # for: if it changes its holder lives, and if it does not for STALE seconds it is stale.
        watched = None
        while True:
            with contextlib.suppress(FileExistsError):
                self._create(content)
                return
            try:
                touched, holder = self._path.stat().st_mtime, _read(self._path)
                age = self._now() - touched
            except FileNotFoundError:  # it was released in between
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
            # One of several processes must not leave alone: they stop together, at a step.
            if signals.requested() and not jax.distributed.is_initialized():
                raise signals.Stopped

    def _create(self, content: str) -> None:
        # Mode "x" is atomic: of several processes that try, one creates the file.
        with open(self._path, "x") as file:
            try:
                file.write(content)
                file.flush()
            except OSError:
                self._path.unlink()
                raise

    def _take_over(self, holder: Holder | None, age: float) -> None:
        """Removes a stale lock; of several processes that try, one succeeds."""
        # Only the process that has created the claim to this holder's lock removes it. A slower one
        # that claims it later finds the lock of another holder, and leaves that alone.
        name = hashlib.sha256(repr(holder).encode()).hexdigest()[:16]
        claim = self._path.with_name(f".{self._path.name}.{name}.stale")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # it was removed in between
                if self._now() - claim.stat().st_mtime > STALE:  # its process was killed
                    claim.unlink()
            time.sleep(0.01)  # the other process needs no longer
            return
        try:
            touched = self._path.stat().st_mtime
            if _read(self._path) != holder:
                return
            # A lock without a holder may also be one that is just being written.
            if holder is None and self._now() - touched <= STALE:
                return
            self._path.unlink()
        except FileNotFoundError:  # it was released in between
            return
        finally:
            claim.unlink(missing_ok=True)
        logging.warning(
            "%s: taking over the lock of %s, which no longer runs (last sign of life %.0f s ago)",
            self._path.parent,
            holder or "an unknown process",
            age,
        )

    def _now(self) -> float:
        """Returns the time of the file system's clock."""
        # A server's clock may differ from this machine's, and touches are stamped by the server.
        probe = pathlib.Path(temporary_beside(self._path))
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            # A lost lock is reported by `require`, before the next write; this thread cannot raise.
            with contextlib.suppress(OSError):
                self.require()
                os.utime(self._path)


def _read(path: pathlib.Path) -> Holder | None:
    """Reads the holder of a lock; None for a missing file, or one that is not (yet) a lock."""
    try:
        holder = Holder(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    valid_pid = isinstance(holder.pid, int) and 0 < holder.pid < 2**31
    return holder if valid_pid else None


def _key(workdir: epath.PathLike) -> str:
    return str(workdir) if "://" in str(workdir) else os.path.realpath(os.path.expanduser(workdir))


def _machine() -> str:
    """Returns a name that two processes share if one can look up the other by its pid."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(pid: int) -> int | None:
    """Returns the start of a process, which distinguishes it from an earlier one with its pid; None
    for a zombie, which has ended and only keeps its status."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name of the program, in parentheses, may contain spaces and parentheses itself.
    state, *numbers = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(numbers[18])
