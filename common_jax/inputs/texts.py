"""Text files that a user wrote: lines of UTF-8, plain or gzipped."""

import gzip
import io
import zlib
from pathlib import Path

MOST_INFLATED = 200  # largest ratio of a text to its gzip file


def read_lines(path: Path) -> tuple[str, ...]:
    """Reads the lines of a UTF-8 text file, plain or gzipped (by its name), and strips them.

    Only a line feed ends a line, since a sentence may contain any other separator of Unicode.

    Raises:
      ValueError: a line that is not UTF-8 or has a zero byte, with its number; lines that end with
        carriage returns alone; a damaged gzip file.
    """
    return tuple(line.strip() for line in read_whole_lines(path))


def read_whole_lines(path: Path) -> tuple[str, ...]:
    """Does what `read_lines` does, but strips only a line's end."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        limit = MOST_INFLATED * len(content) + 1024
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
    if b"\r" in content and b"\n" not in content:
        raise ValueError(
            f"{path} ends its lines with carriage returns alone, so all of it would be one line; "
            "convert it, for example with tr '\\r' '\\n'"
        )
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
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
    return path if path.is_file() else packed if packed.is_file() else None
