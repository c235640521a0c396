"""The files of tokenizers, which anybody may have written: read within bounds, named in errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common_jax.untrusted import plain
from common_jax.workdir import read_json

# The largest published file has 17 MB.
MAX_BYTES = 1 << 27


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError, naming it, for anything else."""
    return read_json(bounded(path))


def bounded(path: Path) -> Path:
    """The path; raises ValueError where the file is larger than any tokenizer's."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, more than any tokenizer's {MAX_BYTES}; fetch "
            "it again"
        )
    return path


def added_message(path: Path, added: Sequence[str]) -> str:
    """The message about tokens that somebody added to a published tokenizer."""
    more = f" and {len(added) - 5} more" if len(added) > 5 else ""
    return (
        f"{path} has tokens that the published tokenizer lacks: "
        f"{plain(', '.join(added[:5]))}{more}. No network here has them in its table; give the "
        "folder of the tokenizer as it was published, where all other tokens have the same ids"
    )
