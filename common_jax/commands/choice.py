"""Finds the package that a config belongs to, by a field that only its configs have."""

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def choose(config: Mapping[str, Any], table: Mapping[str, T]) -> T:
    """The entry of `table` for the one field among its keys that the config has.

    Raises:
      ValueError: for a config with several or none of these fields.
    """
    found = [entry for field, entry in table.items() if field in config]
    if len(found) != 1:
        raise ValueError(
            f"a config of this program has one of the fields {sorted(table)}, and this one has "
            f"{sorted(config)}; pass it to the program that it belongs to"
        )
    return found[0]
