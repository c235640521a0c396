"""Progress of what runs before the steps: reading, decoding, encoding."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import tqdm

T = TypeVar("T")
LOG_SECONDS = 10  # between log lines, if there is no terminal for a progress bar


def progress(
    items: Iterable[T], *, title: str, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """Yields the items, on process 0 with a progress bar on terminals, or else a log line every
    LOG_SECONDS.

    Args:
      items: read one at a time.
      title: what is done with them.
      total: their number, if it is known.
      unit: what they are, such as "batch".
    """
    if jax.process_index():
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm.tqdm(items, total=total, desc=title, unit=unit)
        return
    start = last = time.monotonic()
    for number, item in enumerate(items, start=1):
        if (now := time.monotonic()) - last >= LOG_SECONDS:
            last = now
            done = f"{number} x {unit}" if total is None else f"{100 * number / total:.0f} %"
            logging.info("%s: %s in %.0f s", title, done, now - start)
        yield item
