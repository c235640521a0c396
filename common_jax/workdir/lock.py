"""One writer per workdir: the lock that a run holds while it writes there.

The lock is a file that only one process can create. It names its holder, and a thread of the holder
touches it every few seconds. A holder on the same machine can be looked up, and its lock is stale
as soon as the process has ended. Any other lock is stale once it has not been touched for `STALE`
seconds by the file system's clock, which is the same for all machines.
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
from common_jax.workdir.files import in_bucket
from common_jax.workdir.leftovers import machine, temporary_beside

NAME = "run.lock"
BEAT = 10.0  # seconds between two touches
STALE = 90.0  # seconds without a touch after which a lock is stale
LOOK = 1.0  # seconds between two checks of a lock whose holder cannot be looked up
# Seconds after which the processes of a run must see its lock: NFS clients cache the entries of a
# folder for up to 60 by default.
SIGHT = 90.0

# This process's locks by the workdir's absolute path; None in a bucket, and if the first of several
# processes holds the lock for this one.
_locks: dict[str, "_Lock | None"] = {}


class Locked(OSError):
    """Another process is writing to the workdir."""


class LockLost(OSError):
    """This process has lost its lock to another one, or the lock was deleted."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock; the content of the lock file."""

    host: str
    machine: str  # distinguishes machines, their boots and their containers
    pid: int
    started: int | None  # start time in the kernel's ticks; None if unknown
    since: str  # time of locking, for people
    token: str  # random, different for every lock

    @classmethod
    def this(cls) -> "Holder":
        """Describes this process, as a holder from now on."""
        return cls(
            host=socket.gethostname(),
            machine=machine(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            since=datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            token=secrets.token_hex(16),
        )

    @property
    def alive(self) -> bool | None:
        """True if the process still runs; None if it belongs to another machine or container."""
        if self.machine != machine():
            return None
        try:
            os.kill(self.pid, 0)  # signal 0 only asks whether the process exists
        except ProcessLookupError:
            return False
        except PermissionError:  # it runs, as another user
            pass
        # Pids are reused; together with the start time they are unique until the next boot.
        return self.started is None or self.started == _start_of(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def hold(workdir: epath.PathLike) -> Iterator[None]:
    """Holds the lock of a workdir. Creates a missing workdir, and removes it if it stays empty.

    A process may hold its own lock several times. If several processes form one run, the first
    holds the lock for all; they must call this at the same point. A disk that no lock can be
    written to is not an error here, since a finished run needs no lock; `require` raises the
    OSError later. Buckets have no locks, which logs a warning.

    Raises:
      Locked: if another process holds it, naming host, process and time; in all processes.
      hosts.Disagreement: if one of several processes does not see the lock, since the workdir is
        not on storage that all of them share; in all processes.
    """
    path, lock = _key(workdir), None
    if path in _locks:
        yield
        return
    try:
        # A signal between these two lines would leave a lock that nothing releases.
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
    processes. Raises in all of them, as `hold`."""
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
        # What is below a workdir that is held, such as a run of a pipeline, is on the same storage.
        if not any(path.startswith(f"{other}/") for other in _locks):
            _require_shared(path, lock)
    if refusal is not None:
        raise refusal
    return lock


def _require_shared(path: str, lock: "_Lock | None") -> None:
    """Raises Disagreement in all processes, and releases the lock, unless all see the lock that the
    first has written. One that could not be written, on a read-only disk, is not looked for."""
    token = hosts.send("" if lock is None else lock.token)
    blind = hosts.first_with(bool(token) and not _sees(path, token))
    if blind is None:
        return
    if lock is not None:
        lock.release()
    here = socket.gethostname(), path
    host, there = hosts.send(here, source=blind)
    first, written = hosts.send(here)
    raise hosts.Disagreement(
        f"--workdir={there!r}: process {blind}, on {host}, does not see {NAME}, which process 0, "
        f"on {first}, has written to {written!r}. All processes of a run save to one workdir, so "
        "it must be on storage that all of them share, such as NFS or a bucket: give a --workdir "
        "there"
    )


def _sees(path: str, token: str) -> bool:
    """Whether the lock with this token is in the workdir, or appears there within SIGHT seconds."""
    place, end, looks = pathlib.Path(path) / NAME, time.monotonic() + SIGHT, 0
    while True:
        with contextlib.suppress(OSError):
            if (holder := _read(place)) is not None and holder.token == token:
                return True
        if time.monotonic() >= end:
            return False
        looks += 1
        if looks == 2:
            logging.warning(
                "%s, which process 0 has written, cannot be seen here; waiting up to %.0f s for it",
                place,
                SIGHT,
            )
        time.sleep(LOOK)


def require(workdir: epath.PathLike) -> None:
    """Checks that this process still holds its lock on a workdir, if it has locked it. Call this
    before writing anything that could get mixed with another run's files.

    Raises:
      LockLost: if another process has taken over the lock, or it was deleted.
      OSError: if the lock could not be written.
    """
    if (lock := _locks.get(_key(workdir))) is not None:
        lock.require()


def require_everywhere(workdir: epath.PathLike) -> None:
    """`require`, raising in all processes if process 0, which holds the lock for all, has lost it.
    All processes must call this together."""
    lost = None
    try:
        require(workdir)
    except OSError as error:
        lost = error
    elsewhere = LockLost(f"{workdir} no longer belongs to this run; process 0 says why")
    hosts.raise_everywhere(lost, elsewhere)


class _Lock:
    """A lock that this process holds, or has failed to write."""

    def __init__(self, path: pathlib.Path):
        self._path, self._new_folders = path, []
        self._holder, self._failure = Holder.this(), None
        self._released = threading.Event()

    @classmethod
    def of(cls, workdir: str) -> "_Lock | None":
        """Locks a workdir, unless it is in a bucket; raises Locked."""
        if in_bucket(workdir):
            # Object stores cannot create a file exclusively. Warn once, not for every run below.
            if not any(workdir.startswith(f"{other}/") for other in _locks):
                logging.warning(
                    "%s has no locks: make sure that no other process writes there", workdir
                )
            return None
        lock = cls(pathlib.Path(workdir) / NAME)
        try:
            try:
                lock._take()
            except FileNotFoundError:  # a refused start may have just removed its empty folders
                lock._take()
        except Locked:
            raise
        # `require` raises it later, since a finished run on a read-only disk needs no lock.
        except OSError as error:
            lock._failure = error
            lock._remove_folders()
            return lock
        threading.Thread(target=lock._beat, name="lock", daemon=True).start()
        return lock

    @property
    def token(self) -> str:
        """What tells this lock from all others; "" if it could not be written."""
        return "" if self._failure is not None else self._holder.token

    def require(self) -> None:
        if self._failure is not None:
            error = self._failure
            raise OSError(error.errno, f"no lock can be written: {error.strerror}", str(self._path))
        # Compare tokens, not processes: another lock of the same process is not this one.
        holder = _read(self._path)
        if holder is not None and holder.token == self._holder.token:
            return
        event = (
            f"{self._path.parent} was taken over by {holder}"
            if holder is not None
            else f"{self._path} was deleted, or its folder was"
        )
        raise LockLost(
            f"{event} while this run was writing there. It stops, so that two runs do not mix. "
            "Start the same command again when no other one is running"
        )

    def release(self) -> None:
        """Removes the lock, unless it now belongs to another process, and the folders that it has
        created, if empty."""
        self._released.set()
        with contextlib.suppress(OSError):  # if the lock was lost, or never written
            self.require()
            self._path.unlink()
        self._remove_folders()

    def _remove_folders(self) -> None:
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for folder in reversed(dict.fromkeys(self._new_folders)):
                folder.rmdir()

    def _take(self) -> None:
        for folder in reversed(self._path.parents):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self._new_folders.append(folder)
        content = json.dumps(dataclasses.asdict(self._holder), indent=2) + "\n"
        # Holder and last touch of a lock whose holder cannot be looked up. Wait and see: if they
        # change, the holder is alive; if they do not for STALE seconds, the lock is stale. The time
        # since the first look counts too: a touch may lie in the future, if the folder was copied
        # or the server's clock set back.
        watched, first = None, time.monotonic()
        while True:
            with contextlib.suppress(FileExistsError):
                self._create(content)
                return
            try:
                touched, holder = self._path.stat().st_mtime, _read(self._path)
                age = self._now() - touched
            except FileNotFoundError:  # released in the meantime
                continue
            alive = None if holder is None else holder.alive
            same = watched == (holder, touched)
            quiet = age > STALE or (same and time.monotonic() - first > STALE)
            if alive is False or (alive is None and quiet):
                self._take_over(holder, touched, age)
                continue
            name = "a process that has just started" if holder is None else str(holder)
            if alive or (watched is not None and not same):
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
                    STALE - max(age, 0.0),
                )
            time.sleep(LOOK)
            # One of several processes must not stop alone: they stop together, at a step.
            if signals.requested() and not jax.distributed.is_initialized():
                raise signals.Stopped

    def _create(self, content: str) -> None:
        # Mode "x" is atomic: of several processes that try, only one creates the file.
        with open(self._path, "x") as file:
            try:
                file.write(content)
                file.flush()
            except OSError:
                self._path.unlink()
                raise

    def _take_over(self, holder: Holder | None, touched: float, age: float) -> None:
        """Removes a lock that is stale if it still has this holder and last touch; of several
        processes that try, only one succeeds."""
        # Only the process that creates the claim file for this holder's lock may remove the lock. A
        # slower one that creates it later finds another holder's lock, and leaves that alone.
        name = hashlib.sha256(repr(holder).encode()).hexdigest()[:16]
        claim = self._path.with_name(f".{self._path.name}.{name}.stale")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                # Its process was killed. A time far in the future is no sign of life either.
                if abs(self._now() - claim.stat().st_mtime) > STALE:
                    claim.unlink()
            time.sleep(0.01)  # the other process needs no longer than this
            return
        try:
            # A lock without a readable holder may be another one, in the middle of being written.
            if _read(self._path) != holder or self._path.stat().st_mtime != touched:
                return
            self._path.unlink()
        except FileNotFoundError:  # released in the meantime
            return
        finally:
            claim.unlink(missing_ok=True)
        logging.warning(
            "%s: taking over the lock of %s, which no longer runs (last sign of life %.0f s ago)",
            self._path.parent,
            holder or "an unknown process",
            max(age, 0.0),
        )

    def _now(self) -> float:
        """Returns the time by the file system's clock."""
        # On network storage the server stamps touches, and its clock may differ from ours.
        probe = pathlib.Path(temporary_beside(self._path))
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            # This thread cannot raise; `require` reports a lost lock before the next write.
            with contextlib.suppress(OSError):
                self.require()
                os.utime(self._path)


def _read(path: pathlib.Path) -> Holder | None:
    """Reads a lock's holder; None if the file is missing, or is not (yet) a lock."""
    try:
        holder = Holder(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    valid_pid = isinstance(holder.pid, int) and 0 < holder.pid < 2**31
    return holder if valid_pid else None


def _key(workdir: epath.PathLike) -> str:
    return str(workdir) if in_bucket(workdir) else os.path.realpath(os.path.expanduser(workdir))


def _start_of(pid: int) -> int | None:
    """Returns a process's start time, which tells it from an earlier process with the same pid.
    None if unknown, or for a zombie, which has ended."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The program's name, in parentheses, may itself contain spaces and parentheses.
    state, *numbers = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(numbers[18])
