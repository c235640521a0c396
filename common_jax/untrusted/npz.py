"""Numpy's archives of arrays; nothing that they declare is trusted before it is checked."""

import math
import re
import sys
from collections.abc import Iterable

import numpy as np
from etils import epath

from common_jax.untrusted.refusal import RefusedError, brief
from common_jax.untrusted.shapes import MOST_BYTES, full_size
from common_jax.untrusted.zips import open_archive

MAGIC = b"\x93NUMPY\x01\x00"
# The form in which numpy writes the header of plain numbers and texts. Read this way, no literal is
# evaluated, and structures, objects and dates are refused.
HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[<>|][?biufcSU]\d{1,9})', 'fortran_order': (?P<turned>True|False), "
    r"'shape': \((?P<shape>(\d{1,18}, ?)*(\d{1,18})?)\), \} *\n"
)


def read_npz(path: epath.PathLike, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays of a `.npz` file that `numpy.savez` wrote, by their names.

    Args:
      path: of the file.
      names: which arrays; others are not read.

    Raises:
      ValueError: naming the file, when it is damaged, lacks an array, or holds anything but plain
        numbers and texts.
      OSError: when it cannot be read.
    """
    try:
        with open_archive(path) as archive:
            return {name: _array(name, archive.read(f"{name}.npy")) for name in names}
    except RefusedError as refused:
        raise ValueError(f"{path} {refused}") from None


def _array(name: str, content: bytearray) -> np.ndarray:
    start = len(MAGIC) + 2
    end = start + int.from_bytes(content[len(MAGIC) : start], "little")
    match = HEADER.fullmatch(content[start:end].decode("latin-1"))
    if not content.startswith(MAGIC) or match is None:
        raise RefusedError(f"holds {brief(name)} in a form that numpy does not write")
    try:
        dtype = np.dtype(match["dtype"])
    except TypeError:
        raise RefusedError(f"holds {brief(name)} of type {match['dtype']!r}") from None
    shape = tuple(int(size) for size in re.findall(r"\d+", match["shape"]))
    size = math.prod(shape) * dtype.itemsize
    largest = full_size(shape, dtype.itemsize)
    # Items of no bytes would let all axes be of any length.
    if size != len(content) - end or largest >= MOST_BYTES or len(shape) > 32 or not dtype.itemsize:
        raise RefusedError(
            f"declares {brief(name)} as {dtype} {brief(shape)}, which its {len(content) - end} "
            "bytes are not"
        )
    if dtype.kind == "U":
        codes = np.frombuffer(content, np.dtype("u4").newbyteorder(dtype.byteorder), offset=end)
        if (codes > sys.maxunicode).any():  # of which numpy would make texts that break Python's
            raise RefusedError(f"holds {brief(name)} with characters that there are not")
    array = np.frombuffer(content, dtype, math.prod(shape), end)
    return array.reshape(shape, order="F" if match["turned"] == "True" else "C")
