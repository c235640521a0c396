"""Formats names of files and classes for messages, and checks that they are distinct."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator

LISTED = 700  # characters of names in a message


def listed(names: Iterable[str]) -> str:
    """Returns the first names in sorted order and the number of the others, safe to print.

    Lists at most ten names, and no more than fit in LISTED characters.
    """
    names, shown = sorted(names), []
    for name in map(_shortened, names[:10]):
        if shown and sum(map(len, shown)) + len(name) > LISTED:
            break
        shown.append(name)
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def require_distinct(names: Iterable[str], *, at: str) -> None:
    """Raises ValueError if a name occurs twice."""
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise ValueError(
            f"{at}: these names occur more than once: {listed(duplicates)}; make "
            "them distinct or remove the copies"
        )


def _shortened(name: str) -> str:
    name = printable(name)
    return name if len(name) <= LISTED // 2 else f"{name[: LISTED // 4]}...{name[-LISTED // 4 :]}"


def printable(text: str) -> str:
    """Escapes unprintable characters, such as bytes of a file name that are not UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def naming_path(path: str) -> Iterator[None]:
    """Within the block, a file or folder that the system refuses to read is reported with the field
    that leads to it, config.data.path, whose value is `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise  # has a message of its own
        place = printable(os.fsdecode(error.filename))
        raise type(error)(
            f"config.data.path={path!r}: {place!r} cannot be read ({error.strerror}); make it "
            "readable, remove it or correct config.data.path"
        ) from error
