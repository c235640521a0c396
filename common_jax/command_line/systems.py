"""Tells the configs of one system from those of others, and which fields a kind of run reads."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class System:
    """A package with a command, and how to recognise its configs."""

    package: str
    # The config field that names the kind of run. Configs of other systems lack it.
    field: str
    # The corresponding field of other systems -> their package, for messages.
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)


def check_system(config: Mapping[str, Any], system: System, source: str) -> None:
    """Raises ValueError unless `config`, from a command line or saved by a run, belongs to
    `system`; `source` is its name in messages, such as "--config=FILE"."""
    if system.field in config:
        return
    other = next((package for field, package in system.others.items() if field in config), None)
    if other is None:
        raise ValueError(
            f"{source} has no field {system.field!r}, which every config of {system.package} has"
        )
    raise ValueError(
        f"{source} belongs to {other}, and this is {system.package}; use python -m {other}.main, "
        f"or {other}.load_model"
    )


def unread(paths: Iterable[str], reads: Iterable[str]) -> list[str]:
    """The `paths`, in order, that belong to no field or section in `reads`."""
    sections = tuple(f"{path}." for path in reads)
    # A section counts as read if any of its fields is.
    return [
        path
        for path in paths
        if not any(f"{path}.".startswith(one) or one.startswith(f"{path}.") for one in sections)
    ]
