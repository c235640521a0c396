"""Freed memory is returned to the system."""

import pathlib

import numpy as np
import pytest

from common_jax.weights.memory import give_back

STATUS = pathlib.Path("/proc/self/status")


def resident() -> int:
    """Resident memory of the process in bytes."""
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not STATUS.exists(), reason="/proc, which is read here, is Linux's")
def test_give_back_returns_freed_memory_to_the_system():
    np.ones(8 << 20, np.uint8)  # once freed, glibc keeps blocks of this size
    arrays = [np.ones(4 << 20, np.uint8) for _ in range(40)]
    last = np.ones(1 << 20, np.uint8)  # prevents glibc from freeing the rest by itself
    before = resident()
    del arrays
    give_back()
    assert before - resident() > 120 << 20
    assert last[0] == 1
