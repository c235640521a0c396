"""JSON files that are written whole or not at all, and read with the file's name in every error."""

import json
import os
import secrets
from typing import Any

from etils import epath


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file whole or not at all, whenever the process may be killed."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file whole or not at all, whenever the process may be killed."""
    path = epath.Path(path)
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_beside(path: epath.PathLike) -> epath.Path:
    """A name in the folder of `path` that no other process takes, for a file on its way there."""
    path = epath.Path(path)
    return path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: when the file holds anything else, naming it.
      OSError: when it cannot be read.
    """
    content = epath.Path(path).read_bytes()
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); it was cut off or edited. Restore it, or delete it if "
            "it can be made again"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, where an object is expected")
    return value
