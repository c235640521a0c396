"""Size-limited reading of tokenizer files, whose content is not trusted."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common_jax.untrusted import plain, refuse_pointer
from common_jax.workdir import read_json

# Several times the largest published file, Gemma's.
MAX_BYTES = 1 << 27


def read_record(path: Path) -> dict[str, Any]:
    """Reads a JSON file with one object; raises ValueError, naming the file, for anything else."""
    return read_json(require_bounded(path))


def read_bounded(path: Path) -> bytes:
    """Returns a file's bytes; raises ValueError if it is larger than any tokenizer's, or a git-lfs
    pointer."""
    content = require_bounded(path).read_bytes()
    refuse_pointer(path, content)
    return content


def require_bounded(path: Path) -> Path:
    """Returns the path; raises ValueError if the file is larger than any tokenizer's."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, more than any tokenizer's {MAX_BYTES}; fetch "
            "it again"
        )
    return path


@contextlib.contextmanager
def parsing(path: Path, kind: str) -> Iterator[None]:
    """Turns any error about a file's content into a ValueError saying that the file is not
    `kind`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not {kind} ({type(error).__name__}: {plain(str(error))}); fetch it again"
        ) from error


def added_message(path: Path, added: Sequence[str]) -> str:
    """Returns the message for a published tokenizer to which tokens were added."""
    more = f" and {len(added) - 5} more" if len(added) > 5 else ""
    return (
        f"{path} has tokens that the published tokenizer lacks: "
        f"{plain(', '.join(added[:5]))}{more}. No network here has them in its table; use the "
        "folder of the published tokenizer, in which all other tokens have the same ids"
    )
