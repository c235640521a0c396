"""The package that a config belongs to, by the field that only its configs have."""

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def choose(config: Mapping[str, Any], table: Mapping[str, T]) -> T:
    """The entry of `table` for the one of its fields that a config has.

    Raises:
      ValueError: for a config with several or none of them.
    """
    found = [entry for field, entry in table.items() if field in config]
    if len(found) != 1:
        raise ValueError(
            f"a config must have one of the fields {sorted(table)}, which say what command runs "
            f"it; this one has {sorted(config)}"
        )
    return found[0]
