"""The error for a refused file, the test for a git-lfs pointer, and short, printable forms of
untrusted values for messages."""

import reprlib
from typing import Any

LONGEST = 200  # characters of a value quoted in a message
LFS = b"version https://git-lfs"


class RefusedError(ValueError):
    """A problem with a file; the message continues a sentence that starts with the file's name."""


def refuse_pointer(path: object, content: bytes) -> None:
    """Raises ValueError if a file's content, or its start, is what git puts in its place where
    git-lfs is not installed."""
    if content.startswith(LFS):
        raise ValueError(
            f"{path} is a git-lfs pointer to the file, not the file; run `git lfs pull`"
        )


class _Brief(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python raises ValueError for integers with too many digits.
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 512 else repr(x)

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[:LONGEST])


_BRIEF = _Brief()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, LONGEST // 2, LONGEST // 2


def brief(value: Any) -> str:
    """Returns the shortened repr of a value, in bounded time for any size, depth and content."""
    return _cut(_BRIEF.repr(value))


def plain(text: str) -> str:
    """Returns untrusted text shortened, with question marks for unprintable characters."""
    return _cut("".join(c if c.isprintable() else "?" for c in text[: LONGEST + 1]))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
