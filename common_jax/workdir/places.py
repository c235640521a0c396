"""Checks the paths on a command line before anything is computed."""

import os
import pathlib
import tempfile

from etils import epath

from common_jax.workdir.files import in_bucket


def check_input(key: str, value: str, expected: str) -> None:
    """Raises FileNotFoundError unless the file or folder that a field names exists.

    Args:
      key: name of the field, such as "config.data.path".
      value: a path; not checked if empty or in a bucket (`gs://...`).
      expected: description of the file or folder to give.
    """
    if not value or in_bucket(value):
        return
    path = pathlib.Path(value).expanduser()
    try:
        path.stat()
    except OSError as error:
        raise FileNotFoundError(
            f"{_assignment(key, value)} cannot be found ({_reason(path, error)}); give {expected}"
        ) from error


def check_output(key: str, value: epath.PathLike) -> None:
    """Raises OSError, naming the flag or field `key`, unless the path `value` is a folder or could
    be created. Leaves nothing behind. Buckets are not checked."""
    if in_bucket(value):
        return
    path = pathlib.Path(value).expanduser().absolute()
    try:
        # An existing folder may be read-only, since a finished run is only read.
        if not os.path.isdir(path):
            if os.path.exists(path):
                raise NotADirectoryError("it is a file")
            with tempfile.TemporaryDirectory(dir=_nearest(path)):
                pass
    except OSError as error:
        raise type(error)(
            f"{_assignment(key, str(value))} cannot be made a folder ({_reason(path, error)}); "
            "give another one"
        ) from error


def check_output_file(key: str, value: str) -> pathlib.Path:
    """The path `value` of a file to write. Raises OSError, naming the flag `key`, if no file can be
    written there. Leaves nothing behind."""
    path = pathlib.Path(value).expanduser()
    try:
        if os.path.isdir(path):
            raise IsADirectoryError("it is a folder")
        if not os.path.exists(path):
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        elif not os.access(path, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise type(error)(
            f"{_assignment(key, value)} cannot be written ({_reason(path, error)}); give another "
            "file, in an existing folder"
        ) from error
    return path


def _assignment(key: str, value: str) -> str:
    text = repr(value) if len(value) <= 300 else f"{value[:300]!r}..."
    return f"{key}={text}"


def _reason(path: pathlib.Path, error: OSError) -> str:
    """Describes the problem with `path`, and its nearest existing parent."""
    problem = error.strerror or str(error)
    nearest = _nearest(path.absolute())
    if nearest == path.absolute():
        return problem
    is_file = ", a file," if nearest.is_file() else ""
    return f"{problem}; {nearest}{is_file} is the last part of it that exists"


def _nearest(path: pathlib.Path) -> pathlib.Path:
    """Returns an absolute path itself if it exists, else its nearest existing parent."""
    return next(part for part in (path, *path.parents) if os.path.exists(part))
