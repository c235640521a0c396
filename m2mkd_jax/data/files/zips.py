"""Image files in an uncompressed zip, listed by class and read by offset."""

import os
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from common_jax.inputs.pictures import require_small
from common_jax.untrusted import DAMAGED
from m2mkd_jax.data.files.listing import (
    is_hidden,
    is_image,
    listed,
    missing_split,
    require_class_folders,
    warn_of_other_files,
)

HEADER = 30  # bytes of a member's local header, before its name
END = 22  # bytes of the record at the end, before the zip's comment
UTF8, ENCRYPTED = 0x800, 0x1  # flags of a member
CHECKED = 2**12  # number of other members whose names are checked up front
NOWHERE = 2**62  # an offset past the end of any file


class ZipFiles:
    """The stored (uncompressed) members of a zip, read by offset.

    Reading needs no lock and does not move the file position, so threads share one descriptor; a
    pickled copy opens its own. The central directory, which is large for a million images, is
    parsed only once.
    """

    def __init__(self, root: Path, members: list[zipfile.ZipInfo]):
        self.root = root
        self.names = tuple(member.filename for member in members)
        # One array instead of a million objects, which every worker process would have to copy.
        # Unsigned, since zip64 may declare any size.
        self._places = np.array([_place(member) for member in members], np.uint64).reshape(-1, 7)
        self._file = root.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "_file"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._file = self.root.open("rb")

    def read(self, index: int) -> bytes:
        """Reads the content of a member.

        Raises:
          OSError: its offset, size, name or checksum contradicts the central directory.
        """
        # Python integers, since the sum of two unsigned 64-bit integers may overflow.
        offset, size, stored_size, checksum, *name = map(int, self._places[index])
        # Checked against the size of the file before anything is allocated.
        if offset + size > self._size or size != stored_size:
            raise OSError(f"the zip declares {size} bytes, which it does not have")
        require_small(size)
        header = _local_header(self._file.fileno(), offset, *name)
        if header is None:
            raise OSError("the zip has something else at its offset")
        # Add the lengths of name and extra field. The local extra field may be longer than the one
        # in the central directory, so only the local header tells where the content starts.
        skip = HEADER + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        content = os.pread(self._file.fileno(), size, offset + skip)
        if len(content) != size or zlib.crc32(content) != checksum:
            raise OSError("its bytes do not match the checksum in the zip")
        return content


def _place(member: zipfile.ZipInfo) -> tuple[int, ...]:
    """Returns offset, size, stored size and CRC of a member, and length, CRC and encoding of its
    name."""
    # `orig_filename`, since zipfile truncates `filename` at a zero byte.
    utf8 = member.flag_bits & UTF8
    name = member.orig_filename.encode("utf-8" if utf8 else "cp437")
    # A damaged directory may put a member before the start of the file.
    offset = member.header_offset if member.header_offset >= 0 else NOWHERE
    sizes = member.file_size, member.compress_size
    return offset, *sizes, member.CRC, len(name), zlib.crc32(name), utf8


def _local_header(file: int, offset: int, length: int, checksum: int, utf8: int) -> bytes | None:
    """Returns the local header of a member, including its name; None if the name differs."""
    header = os.pread(file, HEADER + length, min(offset, NOWHERE))
    same = (
        header[:4] == b"PK\x03\x04"
        and int.from_bytes(header[6:8], "little") & UTF8 == utf8
        and zlib.crc32(header[HEADER:]) == checksum
    )
    return header if same else None


def find_in_zip(root: Path, split: str) -> tuple[ZipFiles, list[str], int]:
    """Returns (images, classes, position of the class among the parts of an image's path).

    Raises:
      FileNotFoundError: no such split.
      ValueError: a damaged zip; images that are compressed, encrypted or duplicated; names that
        lead outside the zip.
    """
    try:
        with zipfile.ZipFile(root) as archive:
            members = archive.infolist()
            _require_count(root, len(members), comment=len(archive.comment))
    except PermissionError:
        raise
    except (OSError, *DAMAGED) as error:
        raise ValueError(
            f"config.data.path={str(root)!r} is neither a folder nor a complete zip ({error}); "
            "make the zip again"
        ) from error
    # macOS adds a shadow copy of every file there, with the same suffix.
    members = [m for m in members if not m.filename.startswith("__MACOSX/")]
    outside = [m.filename for m in members if _leads_out(m.filename)]
    _require_none(
        root, outside, "have names that lead outside the zip", "zip the folder from inside"
    )
    tops = {m.filename.split("/")[0] for m in members if "/" in m.filename}
    if split and split not in tops and root.name == f"{split}.zip":
        split = ""  # CLASS/*.jpg: the split's folder was zipped from inside
    inside = [m for m in members if not split or m.filename.startswith(f"{split}/")]
    if not inside:
        raise missing_split(root, split, tops)
    depth = len(Path(split).parts)
    parts = {m.filename: m.filename.split("/")[depth:] for m in inside}
    deep = [m for m in inside if len(parts[m.filename]) > 1]
    classes = sorted({name for m in deep if not is_hidden(name := parts[m.filename][0])} - {""})
    loose = [name for name, below in parts.items() if len(below) == 1 and is_image(below[0])]
    require_class_folders(loose, classes, at=f"config.data.path={str(root)!r}, split {split!r}")
    images = [m for m in deep if parts[m.filename][0] and is_image("/".join(parts[m.filename]))]
    visible = [m for m in deep if not m.is_dir() and not any(map(is_hidden, parts[m.filename]))]
    others = [parts[m.filename][-1] for m in visible if not is_image(m.filename)]
    warn_of_other_files(others, at=f"config.data.path={str(root)!r}, split {split!r}")
    # Sorted by name like a directory, so that a seed selects the same images from either.
    images.sort(key=lambda member: member.filename)
    _require_no_hidden_image(root, members, images)
    duplicates = [name for name, count in Counter(m.filename for m in images).items() if count > 1]
    _require_none(root, duplicates, "occur more than once", "make the zip again")
    encrypted = [m.filename for m in images if m.flag_bits & ENCRYPTED]
    _require_none(root, encrypted, "are encrypted", "make the zip without a password")
    compressed = [m.filename for m in images if m.compress_type != zipfile.ZIP_STORED]
    _require_none(
        root,
        compressed,
        "are compressed",
        "compression does not shrink images and prevents reading them by offset: make the zip with "
        "`zip -0 -r`",
    )
    return ZipFiles(root, images), classes, depth


def _require_count(root: Path, listed_count: int, *, comment: int) -> None:
    """Raises zipfile.BadZipFile if the list of members is incomplete."""
    # A damaged length lets one entry of the directory swallow the next, which zipfile accepts.
    with root.open("rb") as file:
        file.seek(-(END + comment), os.SEEK_END)
        count = int.from_bytes(file.read(END)[10:12], "little")
    # 0xFFFF means that the number is in the zip64 record; some programs count modulo 65,536.
    if count not in (0xFFFF, listed_count % 2**16):
        raise zipfile.BadZipFile(f"{listed_count} of its {count} members are listed")


def _require_no_hidden_image(
    root: Path, members: list[zipfile.ZipInfo], images: list[zipfile.ZipInfo]
) -> None:
    """Raises ValueError if a member that is not an image has another name in its local header.

    A damaged directory can hide an image by renaming it, and an image that is never read is never
    counted as bad. Checks the first CHECKED such members.
    """
    known = {member.filename for member in images}
    others = [m for m in members if m.filename not in known][:CHECKED]
    with root.open("rb") as file:
        for member in others:
            offset, _, _, _, *name = _place(member)
            if _local_header(file.fileno(), offset, *name) is None:
                raise ValueError(
                    f"config.data.path={str(root)!r}: {listed([member.filename])} has another name "
                    "in the zip's directory than in its own header; make the zip again"
                )


def _leads_out(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def _require_none(root: Path, names: list[str], what: str, way_out: str) -> None:
    if names:
        raise ValueError(f"config.data.path={str(root)!r}: {listed(names)} {what}; {way_out}")
