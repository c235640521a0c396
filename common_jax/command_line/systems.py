"""The two systems, told apart by the field of a config that names the kind of run; and what each
kind of run reads of its config."""

from collections.abc import Iterable, Mapping
from typing import Any

SYSTEMS = {"phase": "m2mkd_jax", "stage": "cliptrans_jax"}


def check_system(config: Mapping[str, Any], kind: str, what: str) -> None:
    """Raises ValueError unless `config` is of the system whose configs have the field `kind`.

    Args:
      config: a config or what a run has kept of it.
      kind: a key of SYSTEMS.
      what: the place that the config comes from, as messages call it, such as "--config=FILE".
    """
    if kind in config:
        return
    own = SYSTEMS[kind]
    other = next((system for field, system in SYSTEMS.items() if field in config), None)
    if other is None:
        raise ValueError(f"{what} has no field {kind!r}, as every config of {own} has")
    raise ValueError(
        f"{what} is of {other}, and this is {own}; use python -m {other}.main, or "
        f"{other}.load_model"
    )


def unread(paths: Iterable[str], reads: Iterable[str]) -> list[str]:
    """Those of `paths` that are of no field or section in `reads`, in their order."""
    sections = tuple(f"{path}." for path in reads)
    # A section is read where any of its fields is.
    return [
        path
        for path in paths
        if not any(f"{path}.".startswith(one) or one.startswith(f"{path}.") for one in sections)
    ]
