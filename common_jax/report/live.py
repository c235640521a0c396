"""The report while its runs train: made after the first evaluation, and again now and then."""

import contextlib
import contextvars
import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
from etils import epath

from common_jax.report.page import dispensable

PAUSE = 30.0  # seconds between two reports at least
SHARE = 20  # and so many times as long as the last one took, so that it costs 5 % at most


@dataclasses.dataclass
class _Page:
    path: epath.Path
    write: Callable[[], object]
    due: float = 0.0  # by the monotonic clock


_PAGE: contextvars.ContextVar[_Page | None] = contextvars.ContextVar("page", default=None)


@contextlib.contextmanager
def reporting(path: epath.Path, write: Callable[[], object]) -> Iterator[None]:
    """A block whose runs keep a report up to date with `refresh`; it is made once more at the end.

    Args:
      path: of the report, for warnings.
      write: makes it, with unfinished runs too.
    """
    token = _PAGE.set(_Page(path, write))
    try:
        yield
        refresh(at_once=True)
    finally:
        _PAGE.reset(token)


def refresh(*, at_once: bool = False) -> None:
    """Makes the report of `reporting` on process 0, unless the last one is too recent."""
    page, start = _PAGE.get(), time.monotonic()
    if page is None or jax.process_index() > 0 or not (at_once or start >= page.due):
        return
    with dispensable(page.path):
        page.write()
    end = time.monotonic()
    page.due = end + max(PAUSE, SHARE * (end - start))
