"""Reads configs of other versions of the project: new fields get today's defaults, and removed
fields are named in a warning."""

import dataclasses
import logging
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from common_jax import config as configs
from common_jax.untrusted import plain

T = TypeVar("T")


def freeze_stored(cls: type[T], stored: Mapping[str, Any], source: Any) -> T:
    """Returns the frozen config of a run that any version wrote.

    A field that the stored config lacks gets today's default, which is what earlier versions did; a
    field that `cls` lacks is dropped with a warning. Raises ValueError, naming `source`, for a
    value that `cls` does not accept.
    """
    known, removed = fill(cls, stored)
    name_gone(removed, source)
    try:
        return configs.freeze(cls, known)
    except ValueError as error:
        raise ValueError(f"the config of {source} is not valid in this version: {error}") from error


def fill(cls: type, stored: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Completes a stored config with today's fields, without checking values.

    Returns:
      A nested dict of all fields of `cls`, and the fields that only `stored` has, {"a.b": value}.
    """
    removed: dict[str, Any] = {}
    return _fill(cls, stored, "", removed), removed


def name_gone(removed: Mapping[str, Any], source: Any) -> None:
    """Warns about a run's fields that this version no longer has."""
    lines = [plain(f"config.{name}={str(removed[name])[:60]}") for name in sorted(removed)]
    more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
    if lines:
        fields = ", ".join(lines[:10]) + more
        logging.warning("%s: this version has no %s, which is left out", source, fields)


def _fill(
    cls: type, stored: Mapping[str, Any], path: str, removed: dict[str, Any]
) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in stored.keys() - fields.keys():
        removed[f"{path}{key}"] = stored[key]
    values = {name: _default(field) for name, field in fields.items() if name not in stored}
    for name in fields.keys() & stored.keys():
        values[name] = _fill_value(hints[name], stored[name], f"{path}{name}.", removed)
    return values


def _fill_value(hint: Any, value: Any, path: str, removed: dict[str, Any]) -> Any:
    origin = typing.get_origin(hint)
    if not isinstance(value, Mapping):
        return value
    if origin in (typing.Union, types.UnionType):
        sections = [arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg)]
        # Chooses as `freeze` does: by `kind`, or the first without one. A kind that was removed is
        # kept, so that `freeze` refuses it by name.
        section = sections[0] if sections else None
        if len(sections) > 1 and "kind" in value:
            section = next((s for s in sections if s.kind == value["kind"]), None)
        return dict(value) if section is None else _fill(section, value, path, removed)
    if dataclasses.is_dataclass(hint):
        return _fill(hint, value, path, removed)
    if origin in (dict, Mapping):
        element = typing.get_args(hint)[1]
        return {key: _fill_value(element, x, f"{path}{key}.", removed) for key, x in value.items()}
    return dict(value)


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    value = field.default_factory() if made else field.default
    return configs.unfreeze(value).to_dict() if dataclasses.is_dataclass(value) else value
