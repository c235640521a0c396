"""Untrusted zip archives: an entry is read to its declared size and no further, and only where the
file can hold that much."""

import contextlib
import dataclasses
import errno
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from common_jax.untrusted.refusal import RefusedError, brief, plain

# Errors of `zipfile` for bytes that are no archive, or not a whole one.
DAMAGED = (
    EOFError,
    IndexError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
AGAIN = "copy or download it again"
PIECE = 1 << 24  # bytes that are read at once
# A stored entry is as large as the file has room for. Compression gains little on numbers: an
# archive that inflates to more than this many times its size is a bomb.
MOST_INFLATED = 16
SMALL = 1 << 24  # bytes that do no harm in any file: text compresses better than numbers


@dataclasses.dataclass(frozen=True)
class Archive:
    """An open zip archive.

    Attributes:
      zip: the archive.
      size: of the whole file, in bytes.
      entries: as declared, by name.
    """

    zip: zipfile.ZipFile
    size: int
    entries: Mapping[str, zipfile.ZipInfo]

    @property
    def room(self) -> int:
        """The most bytes that all entries together may inflate to."""
        return max(MOST_INFLATED * self.size, SMALL)

    def read(self, name: str, *, limit: int | None = None) -> bytearray:
        """The bytes of an entry, whose number and checksum are as declared.

        Args:
          name: of the entry.
          limit: in bytes; None for the size of the file.

        Raises:
          RefusedError: when the entry is missing, damaged, or declares more than `limit`.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise RefusedError(f"lacks {brief(name)}; {AGAIN}")
        self.require_room([name], limit=self.size if limit is None else limit)
        content, start = bytearray(entry.file_size), 0
        with _damaged(), self.zip.open(entry) as file:
            while start < len(content):
                # With a size, so that a compressed entry inflates to no more than it declares.
                piece = file.read(min(len(content) - start, PIECE))
                if not piece:
                    raise EOFError(f"{brief(name)} ends early")
                content[start : start + len(piece)] = piece
                start += len(piece)
            file.read(1)  # compares the checksum of an empty entry too
        return content

    def require_room(self, names: Sequence[str], *, limit: int | None = None) -> None:
        """Raises RefusedError when these entries together declare more than `limit`, in bytes
        (None: `room`), or one more than the file has room for."""
        entries = [self.entries[name] for name in names]
        for entry in entries:
            stored = entry.compress_type == zipfile.ZIP_STORED
            if not stored and entry.compress_type != zipfile.ZIP_DEFLATED:
                raise RefusedError(f"has {brief(entry.filename)} in a compression that is not read")
            size = max(entry.compress_size, entry.file_size if stored else 0)
            if entry.header_offset < 0 or entry.header_offset + size > self.size:
                raise RefusedError(
                    f"is damaged or cut off ({brief(entry.filename)} should be {size} bytes of a "
                    f"file of {self.size}); {AGAIN}"
                )
        limit = self.room if limit is None else limit
        if (total := sum(entry.file_size for entry in entries)) > limit:
            what = brief(names[0]) if len(names) == 1 else f"{len(names)} entries"
            raise RefusedError(
                f"declares {total} bytes in {what}, which a file of {self.size} bytes should not "
                f"hold; {AGAIN}"
            )


@contextlib.contextmanager
def open_archive(path: epath.PathLike) -> Iterator[Archive]:
    """Opens a zip archive.

    Raises:
      RefusedError: when it is none, or has two entries of one name.
      OSError: when the file cannot be read.
    """
    with epath.Path(path).open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        with _damaged():
            archive = zipfile.ZipFile(file)
        with archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise RefusedError(f"is damaged (it has two entries of one name); {AGAIN}")
            yield Archive(archive, size, entries)


@contextlib.contextmanager
def _damaged() -> Iterator[None]:
    try:
        yield
    except RefusedError:
        raise
    except DAMAGED as error:
        reason = plain(str(error)) or type(error).__name__
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before or after all that a file can have
            raise
        reason = "it points to a place that no file has"
    else:
        return
    raise RefusedError(f"is damaged or cut off ({reason}); {AGAIN}")
