"""Helpers for tests that compare arrays."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util


def assert_same(found: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Requires the same names, and the same type and values under each name, in nested dicts
    too."""
    found, want = (traverse_util.flatten_dict(dict(tree), sep="/") for tree in (found, want))
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def assert_all_same(found: Iterable[Mapping], want: Iterable[Mapping]) -> None:
    """Requires equally many dicts, each equal to its counterpart."""
    for one, other in zip(found, want, strict=True):
        assert_same(one, other)


def assert_close(found: Any, want: Any, tolerance: float = 1e-10) -> None:
    """Requires trees with equally many leaves, which differ by at most `tolerance`, absolute and
    relative."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
