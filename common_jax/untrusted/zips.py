"""Reads untrusted zip archives: an entry is read only up to its declared size, and only if the file
can contain that much."""

import contextlib
import dataclasses
import errno
import io
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from common_jax.untrusted.refusal import RefusedError, brief, plain

# What `zipfile` raises for bytes that are not an intact archive.
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
PIECE = 1 << 24  # bytes per read
# A stored entry cannot be larger than the file. Numbers compress little, so an archive that
# inflates to more than this many times its size is a bomb.
MOST_INFLATED = 16
SMALL = 1 << 24  # bytes that are always allowed: text compresses better than numbers
LOCAL_HEADER = struct.Struct("<26xHH")  # ends with the lengths of name and extra field


@dataclasses.dataclass(frozen=True)
class Archive:
    """An open zip archive."""

    zip: zipfile.ZipFile
    size: int  # bytes of the whole file
    entries: Mapping[str, zipfile.ZipInfo]  # as declared in its directory, by name

    @property
    def room(self) -> int:
        """The most bytes that all entries together may inflate to."""
        return max(MOST_INFLATED * self.size, SMALL)

    def read(self, name: str, *, limit: int | None = None) -> bytearray:
        """Reads an entry, which must have its declared size and checksum. Raises RefusedError if it
        is missing or damaged, or declares more than `limit` bytes (None: the file's size)."""
        entry = self.entries.get(name)
        if entry is None:
            raise RefusedError(f"lacks {brief(name)}; {AGAIN}")
        self.require_room([name], limit=self.size if limit is None else limit)
        content, start = bytearray(entry.file_size), 0
        with _damaged(), self.zip.open(entry) as file:
            while start < len(content):
                # With a size, so a compressed entry cannot inflate beyond its declaration.
                piece = file.read(min(len(content) - start, PIECE))
                if not piece:
                    raise EOFError(f"{brief(name)} ends early")
                content[start : start + len(piece)] = piece
                start += len(piece)
            file.read(1)  # makes zipfile check the checksum, even of an empty entry
        return content

    def view(self, name: str) -> memoryview:
        """Maps an uncompressed entry into memory, and reads it once to check its checksum. Other
        entries, and those of files not on a disk, are read instead. Raises RefusedError as
        `read`."""
        entry = self.entries.get(name)
        descriptor = _descriptor(self.zip)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED or descriptor is None:
            return memoryview(self.read(name))
        self.require_room([name], limit=self.size)
        with _damaged():
            self.zip.open(entry).close()  # checks the entry's local header against the directory
            header = os.pread(descriptor, LOCAL_HEADER.size, entry.header_offset)
            start = entry.header_offset + len(header) + sum(LOCAL_HEADER.unpack(header))
            mapped = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
            content = mapped[start : start + entry.file_size]
            if len(content) < entry.file_size or zlib.crc32(content) != entry.CRC:
                raise zipfile.BadZipFile(f"Bad CRC-32 for {brief(name)}")
        return content

    def require_room(self, names: Sequence[str], *, limit: int | None = None) -> None:
        """Raises RefusedError if entries together declare more than `limit` bytes (None: `room`),
        or one of them more than the file can contain."""
        entries = [self.entries[name] for name in names]
        for entry in entries:
            stored = entry.compress_type == zipfile.ZIP_STORED
            if not stored and entry.compress_type != zipfile.ZIP_DEFLATED:
                raise RefusedError(f"has {brief(entry.filename)} in an unsupported compression")
            size = max(entry.compress_size, entry.file_size if stored else 0)
            if entry.header_offset < 0 or entry.header_offset + size > self.size:
                raise RefusedError(
                    f"is damaged or cut off ({brief(entry.filename)} should be {size} bytes of a "
                    f"file of {self.size}); {AGAIN}"
                )
        limit = self.room if limit is None else limit
        if (total := sum(entry.file_size for entry in entries)) > limit:
            where = brief(names[0]) if len(names) == 1 else f"{len(names)} entries"
            raise RefusedError(
                f"declares {total} bytes in {where}, which a file of {self.size} bytes should not "
                f"hold; {AGAIN}"
            )


@contextlib.contextmanager
def open_archive(path: epath.PathLike) -> Iterator[Archive]:
    """Opens a zip archive. Raises RefusedError if it is not one, or has two entries with the same
    name, and OSError if the file cannot be read."""
    with epath.Path(path).open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        with _damaged():
            archive = zipfile.ZipFile(file)
        with archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise RefusedError(f"is damaged (it has two entries with the same name); {AGAIN}")
            yield Archive(archive, size, entries)


def _descriptor(archive: zipfile.ZipFile) -> int | None:
    try:
        return archive.fp.fileno()
    except (AttributeError, OSError):  # a file in an object store
        return None


@contextlib.contextmanager
def _damaged() -> Iterator[None]:
    try:
        yield
    except RefusedError:
        raise
    except DAMAGED as error:
        reason = plain(str(error)) or type(error).__name__
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: an offset that no file can have
            raise
        reason = "it points to an offset that no file can have"
    else:
        return
    raise RefusedError(f"is damaged or cut off ({reason}); {AGAIN}")
