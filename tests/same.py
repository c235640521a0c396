"""What tests that compare arrays by name share."""

from collections.abc import Iterable, Mapping

import numpy as np


def assert_same(found: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    """The same names, and of each the same type and values."""
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def assert_all_same(found: Iterable[Mapping], want: Iterable[Mapping]) -> None:
    """As many, and each the same."""
    for one, other in zip(found, want, strict=True):
        assert_same(one, other)
