"""What a format of files is to `make fuzz`, and when two readings are the same."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mutations import Mutate


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      name: in the table.
      file: its name on disk.
      samples: whole files of it.
      edits: forgeries that know its structure, and give whatever checksums it has.
      read: our reading of a path; ValueError and OSError are documented.
      plain: an independent reading, of the path and the bytes in it; raises where it cannot.
      checked: whether checksums cover the data, so that bytes changed without them must not show.
      prepare: writes what must lie beside the file into a folder.
      agree: whether what we read is what an independent reading gives, or the sample.
    """

    name: str
    file: str
    samples: tuple[bytes, ...]
    edits: tuple[Mutate, ...]
    read: Callable[[Path], Any]
    plain: Callable[[Path, bytes], Any]
    checked: bool
    prepare: Callable[[Path], None] = lambda folder: None
    agree: Callable[[Any, Any], bool] = lambda found, plain: same(found, plain)


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in content and type, NaN with NaN."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b


@contextlib.contextmanager
def limited(seconds: int):
    """Raises TimeoutError where the independent reading, which has no bounds, takes too long."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
