"""Short, printable messages that refuse a file."""

import reprlib
from typing import Any

LONGEST = 200  # characters of a value that a message quotes


class RefusedError(ValueError):
    """A file is refused; the message follows the name of the file."""


class _Brief(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print very large integers with a ValueError.
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 512 else repr(x)


_BRIEF = _Brief()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, LONGEST // 2, LONGEST // 2


def brief(value: Any) -> str:
    """The repr of a value, cut: in bounded time, whatever its size, depth and content."""
    return _cut(_BRIEF.repr(value))


def plain(text: str) -> str:
    """Untrusted text, cut, with a question mark for each letter that cannot be printed."""
    return _cut("".join(c if c.isprintable() else "?" for c in text[: LONGEST + 1]))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
