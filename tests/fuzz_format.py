"""Describes a file format for `make fuzz`, and says when two readings are equal."""

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
      name: name in the table.
      file: file name on disk.
      samples: contents of intact files.
      edits: forgeries that know the format's structure, and fix its checksums, if any.
      read: our reading of a path; ValueError and OSError are documented.
      plain: an independent reading, of the path and its bytes; raises if it fails.
      checked: whether checksums cover the data, so that changed bytes must never be returned.
      prepare: writes what must be next to the file into a folder.
      agree: whether our reading equals an independent one, or the sample.
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
    """Raises TimeoutError if the independent reading, which has no limits of its own, takes too
    long."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
