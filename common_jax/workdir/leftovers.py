"""Names of files that are still being written, and removal of those that killed writers left."""

import contextlib
import functools
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import socket
import time

from etils import epath

NAME = re.compile(r"\..+\.([0-9a-f]{8})\.([0-9]+)\.[0-9a-f]{8}\.tmp")  # machine, process
OLD = 3600.0  # seconds without a write after which another machine's file counts as left behind


def temporary_beside(path: epath.PathLike) -> epath.Path:
    """Returns a unique name in the folder of `path`, for what will be renamed to it."""
    path = epath.Path(path)
    return path.parent / f".{path.name}.{_here()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def remove_leftovers(folder: epath.PathLike) -> None:
    """Deletes the temporary files and folders of writers that no longer run. Those of another
    machine are deleted if nothing has been written to them for `OLD` seconds."""
    with contextlib.suppress(OSError):  # the write that follows reports what is wrong
        for path in pathlib.Path(folder).iterdir():
            if _is_left(path):
                with contextlib.suppress(OSError):  # another process was faster
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_left(path: pathlib.Path) -> bool:
    match = NAME.fullmatch(path.name)
    if match is None:
        return False
    where, process = match.groups()
    if where == _here() and os.path.exists("/proc/self"):
        return not os.path.exists(f"/proc/{process}")
    with contextlib.suppress(OSError):
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        return time.time() - max(file.stat().st_mtime for file in files) > OLD
    return False


def _here() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8]


@functools.cache
def machine() -> str:
    """Returns a name that is the same for two processes if they can look up each other's pids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
