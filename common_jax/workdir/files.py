"""Writes JSON files atomically, and reads them with the file's name in every error."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from etils import epath

from common_jax.untrusted import RefusedError, brief, parse_json, refuse_pointer


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file atomically, even if the process is killed meanwhile."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file atomically, even if the process is killed meanwhile."""
    with replacing(path) as part:
        part.write_bytes(content)


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a new file's path; the file replaces `path` if the block succeeds, else is deleted.

    Raises:
      OSError: as the block; an error without a file name, as of a full disk, gets `path`.
    """
    path = epath.Path(path)
    part = temporary_beside(path)
    try:
        yield part
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill; if the block succeeds, it becomes `path`, which must be free or an
    empty folder, else it is deleted."""
    part = Path(temporary_beside(path))
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def in_bucket(path: epath.PathLike) -> bool:
    """True for a path such as `gs://bucket/run`."""
    return "://" in str(path)


def list_folder(folder: epath.PathLike) -> list[epath.Path]:
    """Returns the entries of a folder; [] if there is none, or if it may not be read, as
    `lost+found` at the top of a disk."""
    folder = epath.Path(folder)
    try:
        return [*folder.iterdir()] if folder.is_dir() else []
    except PermissionError:
        return []


def temporary_beside(path: epath.PathLike) -> epath.Path:
    """Returns a unique name in the folder of `path`, for what will be renamed to it."""
    path = epath.Path(path)
    return path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def read_json(
    path: epath.PathLike, fields: Mapping[str, type | UnionType] | None = None
) -> dict[str, Any]:
    """Reads the object in a JSON file; it must have `fields` with these types, and may have more.

    Raises:
      ValueError: for any other content, naming the file and the problem.
      OSError: if the file cannot be read.
    """
    content = epath.Path(path).read_bytes()
    refuse_pointer(path, content)
    try:
        value = parse_json(content)
        if not isinstance(value, dict):
            raise RefusedError(f"must hold a JSON object, not a {type(value).__name__}")
        for name, kind in (fields or {}).items():
            if name not in value:
                raise RefusedError(f"lacks {name!r}")
            # In Python, bool is a subclass of int.
            if not isinstance(value[name], kind) or isinstance(value[name], bool):
                expected = getattr(kind, "__name__", kind)
                raise RefusedError(
                    f"has {name!r}: {brief(value[name])}, which is not of type {expected}"
                )
    except RefusedError as refused:
        raise ValueError(
            f"{path} {refused}; it was cut off or edited. Restore it, or delete it if it can be "
            "recreated"
        ) from None
    return value
