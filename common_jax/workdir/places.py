"""Checks of the paths in a config or on a command line, before anything is computed."""

import os
import pathlib
import tempfile
from collections.abc import Iterator

from etils import epath


def check_input(key: str, value: str, expected: str) -> None:
    """Raises FileNotFoundError unless the file or folder that a field names is there.

    Args:
      key: the field, such as "config.data.path".
      value: a path; an empty one, or one in a bucket (`gs://...`), is not checked.
      expected: the kind of file or folder, for the message.
    """
    if not value or "://" in value:
        return
    path = pathlib.Path(value).expanduser()
    try:
        path.stat()
    except OSError as error:
        raise FileNotFoundError(
            f"{_named(key, value)} cannot be found ({_reason(path, error)}); give {expected}"
        ) from error


def check_output(key: str, value: epath.PathLike) -> None:
    """Raises OSError unless `value` is a folder or can be made one; leaves no file.

    Args:
      key: the flag or the field, such as "--workdir".
      value: a path; one in a bucket is not checked.
    """
    if "://" in str(value):
        return
    path = pathlib.Path(value).expanduser().absolute()
    try:
        # An existing folder may be read-only: a finished run is only read.
        if not os.path.isdir(path):
            if os.path.exists(path):
                raise NotADirectoryError("it is a file")
            with tempfile.TemporaryDirectory(dir=_nearest(path)):
                pass
    except OSError as error:
        raise type(error)(
            f"{_named(key, str(value))} cannot be made a folder ({_reason(path, error)}); give "
            "another one"
        ) from error


def _named(key: str, value: str) -> str:
    text = repr(value) if len(value) <= 300 else f"{value[:300]!r}..."
    return f"{key}={text}"


def _reason(path: pathlib.Path, error: OSError) -> str:
    """The reason why `path` cannot be used, and the last part of it that exists."""
    why = error.strerror or str(error)
    nearest = _nearest(path.absolute())
    if nearest == path.absolute():
        return why
    is_file = ", a file," if nearest.is_file() else ""
    return f"{why}; {nearest}{is_file} is the last part of it that exists"


def _nearest(path: pathlib.Path) -> pathlib.Path:
    """The last part of an absolute path that exists."""
    return next(one for one in _upwards(path) if os.path.exists(one))


def _upwards(path: pathlib.Path) -> Iterator[pathlib.Path]:
    yield path
    yield from path.parents
