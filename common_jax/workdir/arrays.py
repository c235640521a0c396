"""Caches computed arrays in npz files, with a fingerprint of everything that determines them."""

from collections.abc import Mapping

import numpy as np
from etils import epath
from numpy.typing import DTypeLike

from common_jax.untrusted import brief, read_npz
from common_jax.workdir.files import replacing


def write_arrays(path: epath.PathLike, fingerprint: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays with their fingerprint, atomically; creates the folder."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, fingerprint=np.array(fingerprint), **arrays)


def read_arrays(
    path: epath.PathLike, kinds: Mapping[str, tuple[DTypeLike, int]], *, mapped: bool
) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the fingerprint and the arrays of a file that `write_arrays` wrote.

    Args:
      path: the file.
      kinds: name -> dtype and number of axes of each array.
      mapped: whether to memory-map the arrays. The file is still read once, to detect damage.

    Raises:
      ValueError: for a damaged file, or one with other arrays; the message names it.
      OSError: if it cannot be read.
    """
    arrays = read_npz(path, ("fingerprint", *kinds), mapped=mapped)
    fingerprint = arrays.pop("fingerprint")
    for name, (dtype, axes) in kinds.items():
        array = arrays[name]
        if array.ndim != axes or array.dtype != dtype:
            raise ValueError(
                f"{path} is damaged (its {name} are {array.dtype} {brief(array.shape)})"
            )
    if fingerprint.ndim or fingerprint.dtype.kind != "U":
        raise ValueError(
            f"{path} is damaged (its fingerprint is {fingerprint.dtype} {brief(fingerprint.shape)})"
        )
    return str(fingerprint), arrays
