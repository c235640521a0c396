"""The error for a refused file, and short, printable forms of untrusted values for messages."""

import reprlib
from typing import Any

LONGEST = 200  # characters of a value quoted in a message


class RefusedError(ValueError):
    """A problem with a file; the message continues a sentence that starts with the file's name."""


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
