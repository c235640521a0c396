"""Writes JSON files atomically, and reads them with the file's name in every error."""

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from etils import epath

from common_jax.untrusted import RefusedError, brief, parse_json, refuse_pointer
from common_jax.workdir.leftovers import remove_leftovers, temporary_beside

# What the user has to do before a write can succeed, by errno or, since tensorstore's own errors
# have none, by the text of the error.
REMEDIES = (
    (errno.ENOSPC, "No space left", "Make room"),
    (errno.EDQUOT, "quota exceeded", "Make room"),
    (errno.EFBIG, "File too large", "Raise the limit on the size of files (ulimit -f)"),
)


def remedy(number: int | None, reason: str = "") -> str:
    """What the user has to do about a failed write, given its errno and text; "" if unknown."""
    found = (does for key, text, does in REMEDIES if key == number or text in reason)
    return next(found, "")


def describe_error(error: Exception) -> str:
    """The message for an error of the user or the disk, with the way out of a full disk."""
    does = remedy(getattr(error, "errno", None))
    return f"{error}. {does}, and start the same command again" if does else str(error)


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
    Also deletes what killed writers have left in the folder.

    Raises:
      OSError: as the block; an error that names no file, or the new one, names `path` instead.
    """
    path = epath.Path(path)
    part = temporary_beside(path)
    if not in_bucket(path):
        remove_leftovers(path.parent)
    try:
        yield part
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        unnamed = isinstance(error, OSError) and error.filename in (None, str(part), part)
        if unnamed and error.errno:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill; if the block succeeds, it becomes `path`, which must be free or an
    empty folder, else it is deleted. Also deletes what killed writers have left beside it."""
    part = Path(temporary_beside(path))
    remove_leftovers(part.parent)
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
