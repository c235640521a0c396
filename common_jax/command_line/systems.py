"""Configs of one system told from those of others, and the fields that a kind of run reads."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class System:
    """A package with a command, and how its configs are recognised."""

    package: str
    # Of its configs; names the kind of run. Configs of other systems lack it.
    field: str
    # The same field of other systems -> their package, for messages.
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)


def check_system(config: Mapping[str, Any], system: System, source: str) -> None:
    """Raises ValueError unless `config`, as a command reads it or a run has saved it, is of
    `system`; `source` is its name in messages, such as "--config=FILE"."""
    if system.field in config:
        return
    other = next((package for field, package in system.others.items() if field in config), None)
    if other is None:
        raise ValueError(
            f"{source} has no field {system.field!r}, as every config of {system.package} has"
        )
    raise ValueError(
        f"{source} is of {other}, and this is {system.package}; use python -m {other}.main, or "
        f"{other}.load_model"
    )


def unread(paths: Iterable[str], reads: Iterable[str]) -> list[str]:
    """Those of `paths`, in order, that belong to no field or section in `reads`."""
    sections = tuple(f"{path}." for path in reads)
    # A section is read where any of its fields is.
    return [
        path
        for path in paths
        if not any(f"{path}.".startswith(one) or one.startswith(f"{path}.") for one in sections)
    ]
