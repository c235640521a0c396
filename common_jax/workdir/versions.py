"""Configs that other versions of the project wrote: fields that were added since get today's
defaults, fields that were removed are named."""

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
    """The frozen config of a run, of whatever version.

    Args:
      cls: the dataclass of the config.
      stored: as the run saved it. A missing field gets today's default, since the default of a new
        field is what earlier versions did; one that `cls` lacks is left out, with a warning.
      source: its name in messages.

    Raises:
      ValueError: for a value that `cls` refuses, naming `source`.
    """
    known, gone = fill(cls, stored)
    if gone:
        logging.warning("%s: this version has no %s, which it leaves out", source, _list(gone))
    try:
        return configs.freeze(cls, known)
    except ValueError as error:
        raise ValueError(f"the config of {source} is not one of this version: {error}") from error


def fill(cls: type, stored: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stored config with today's fields; no value is checked.

    Returns:
      The nested dict of all fields of `cls`, and the other fields of `stored`, {"a.b": value}.
    """
    gone: dict[str, Any] = {}
    return _fill(cls, stored, "", gone), gone


def name_gone(gone: Mapping[str, Any], source: Any) -> None:
    """Warns of the fields of a run that this version no longer has."""
    if gone:
        logging.warning("%s: this version has no %s; the run resumes without", source, _list(gone))


def _fill(cls: type, stored: Mapping[str, Any], path: str, gone: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in stored.keys() - fields.keys():
        gone[f"{path}{key}"] = stored[key]
    filled = {name: _default(field) for name, field in fields.items() if name not in stored}
    for name in fields.keys() & stored.keys():
        filled[name] = _fill_value(hints[name], stored[name], f"{path}{name}.", gone)
    return filled


def _fill_value(hint: Any, value: Any, path: str, gone: dict[str, Any]) -> Any:
    origin = typing.get_origin(hint)
    if not isinstance(value, Mapping):
        return value
    if origin in (typing.Union, types.UnionType):
        sections = [arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg)]
        # As `freeze` chooses: by `kind`, the first where none is named. A kind that was removed
        # stays as it is, so that `freeze` refuses it by name.
        chosen = sections[0] if sections else None
        if len(sections) > 1 and "kind" in value:
            kinds = (section for section in sections if section.kind == value["kind"])
            chosen = next(kinds, None)
        return dict(value) if chosen is None else _fill(chosen, value, path, gone)
    if dataclasses.is_dataclass(hint):
        return _fill(hint, value, path, gone)
    if origin in (dict, Mapping):
        element = typing.get_args(hint)[1]
        return {key: _fill_value(element, x, f"{path}{key}.", gone) for key, x in value.items()}
    return dict(value)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    return configs.unfreeze(value).to_dict() if dataclasses.is_dataclass(value) else value


def _list(gone: Mapping[str, Any]) -> str:
    shown = [plain(f"config.{name}={str(gone[name])[:60]}") for name in sorted(gone)]
    more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
    return ", ".join(shown[:10]) + more
