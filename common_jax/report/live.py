"""Keeps a report up to date during training: after the first evaluation, and then at intervals."""

import contextlib
import contextvars
import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
from etils import epath

from common_jax.report.page import dispensable

PAUSE = 30.0  # least seconds between two reports
SHARE = 20  # also at least this many times what the last one took, so that reports cost at most 5 %


@dataclasses.dataclass
class _Page:
    path: epath.Path
    write: Callable[[], object]
    due: float = 0.0  # in time.monotonic()


_PAGE: contextvars.ContextVar[_Page | None] = contextvars.ContextVar("page", default=None)


@contextlib.contextmanager
def reporting(path: epath.Path, write: Callable[[], object]) -> Iterator[None]:
    """A block whose runs keep a report up to date with `refresh`; it is written again at the end.

    Args:
      path: the report's path, for warnings.
      write: writes the report, which may include unfinished runs.
    """
    token = _PAGE.set(_Page(path, write))
    try:
        yield
        refresh(at_once=True)
    finally:
        _PAGE.reset(token)


def refresh(*, at_once: bool = False) -> None:
    """Writes the report of `reporting`, on process 0, unless the last one is too recent."""
    page, start = _PAGE.get(), time.monotonic()
    if page is None or jax.process_index() > 0 or not (at_once or start >= page.due):
        return
    with dispensable(page.path):
        page.write()
    end = time.monotonic()
    page.due = end + max(PAUSE, SHARE * (end - start))
