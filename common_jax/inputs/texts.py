"""Reads user-supplied text files: lines of UTF-8, plain or gzipped."""

import gzip
import io
import itertools
import logging
import zlib
from pathlib import Path

import numpy as np

from common_jax.inputs.ragged import Lines, Ragged
from common_jax.untrusted import refuse_pointer

GZIP = b"\x1f\x8b"
MOST_INFLATED = 200  # largest ratio of a text to its gzip file ...
HARMLESS = 1 << 26  # ... if it is larger than this: mostly blank lines shrink a thousandfold
CHECKED = 1 << 16  # lines decoded at a time to check that they are UTF-8
# ASCII white space, as in `str.strip`.
BLANK = np.isin(np.arange(256), [*range(9, 14), *range(28, 33)])
# First and last bytes of characters that may be white space (U+0085, U+00A0, U+1680, U+2000 to
# U+205F, U+3000).
WIDE_FIRST = np.isin(np.arange(256), [0xC2, 0xE1, 0xE2, 0xE3])
WIDE_LAST = np.isin(np.arange(256), [*range(0x80, 0x8B), 0x9F, 0xA0, 0xA8, 0xA9, 0xAF])


def read_lines(path: Path) -> Lines:
    """Reads the lines of a UTF-8 text file, plain or gzipped (by its name), and strips them.

    Only a line feed ends a line, since a sentence may contain any other Unicode separator.

    Raises:
      ValueError: for a line that is not UTF-8 or has a zero byte, with its number; for lines that
        end with carriage returns only; for a damaged gzip file, or one not named .gz; for a
        git-lfs pointer.
    """
    content = _read(path)
    utf8 = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(utf8 == ord("\n"))
    if len(utf8) and utf8[-1] != ord("\n"):
        ends = np.append(ends, len(utf8))
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    if not _is_text(content, starts):
        _decode(path, content)  # raises, with the number of the line
    return Lines(_stripped(utf8, starts, ends))


def read_whole_lines(path: Path) -> tuple[str, ...]:
    """Like `read_lines`, but strips only line endings."""
    return _decode(path, _read(path))


def _read(path: Path) -> bytes:
    """Returns the file's bytes, unpacked and without a byte order mark."""
    content = path.read_bytes()
    refuse_pointer(path, content)
    if path.suffix == ".gz":
        limit = max(MOST_INFLATED * len(content), HARMLESS)
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(limit + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} is not a complete gzip file ({error}); fetch it again"
            ) from error
        if len(content) > limit:
            raise ValueError(
                f"{path} unpacks to more than {MOST_INFLATED} times its size, which no text does; "
                "fetch it again"
            )
    elif content.startswith(GZIP):
        raise ValueError(f"{path} is a gzip file; rename it to {path.name}.gz")
    # More than line feeds: the last line may end with both.
    if content.count(b"\r") - content.count(b"\r\n") > content.count(b"\n"):
        raise ValueError(
            f"{path} ends its lines with carriage returns alone, so many would be one line; "
            r"convert it, for example with perl -pi -e 's/\r\n?/\n/g'"
        )
    return content.removeprefix(b"\xef\xbb\xbf")


def _is_text(content: bytes, starts: np.ndarray) -> bool:
    """Returns True for UTF-8 without zero bytes, whose lines begin at `starts`."""
    if b"\0" in content:
        return False
    view = memoryview(content)
    # In pieces, since decoding a whole file may take four times its size.
    bounds = [*starts[::CHECKED].tolist(), len(content)]
    try:
        for first, last in itertools.pairwise(bounds):
            str(view[first:last], "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _stripped(utf8: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Ragged:
    """Returns the lines from `starts` to `ends`, stripped of white space."""
    # Lines that end with a carriage return or a space are common, so strip one ASCII character at
    # each end of all lines at once, twice. Lines that need more are rare.
    for _ in range(2):
        starts = starts + ((starts < ends) & BLANK[utf8[np.minimum(starts, len(utf8) - 1)]])
        ends = ends - ((starts < ends) & BLANK[utf8[ends - 1]])
    filled = np.flatnonzero(starts < ends)
    first, last = utf8[starts[filled]], utf8[ends[filled] - 1]
    for row in filled[BLANK[first] | WIDE_FIRST[first] | BLANK[last] | WIDE_LAST[last]]:
        text = utf8[starts[row] : ends[row]].tobytes().decode()
        starts[row] = ends[row] - len(text.lstrip().encode())
        ends[row] = starts[row] + len(text.strip().encode())
    return Ragged(utf8, starts, (ends - starts).astype(np.int32))


def _decode(path: Path, content: bytes) -> tuple[str, ...]:
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    decoded = []
    for number, line in enumerate(lines, start=1):
        if b"\0" in line:
            raise ValueError(
                f"{path}, line {number} has a zero byte: it is not text, or text in UTF-16; "
                "convert the file to UTF-8, for example with iconv"
            )
        try:
            decoded.append(line.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not UTF-8 ({error.reason} at byte {error.start}); "
                "convert the file, for example with iconv"
            ) from error
    return tuple(decoded)


def find_text(path: Path) -> Path | None:
    """Returns `path` or, if that does not exist, `path`.gz; None if neither does."""
    packed = path.with_name(f"{path.name}.gz")
    there = [file for file in (path, packed) if file.is_file()]
    if len(there) > 1:
        logging.warning("%s is read, and %s beside it is not", path, packed.name)
    return there[0] if there else None
