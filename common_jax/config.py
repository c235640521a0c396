"""ConfigDict outside, frozen dataclasses inside.

A config file turns the defaults of a dataclass into a `ConfigDict` (`unfreeze`), flags change it,
and a run turns it back once, at the top (`freeze`). A default therefore stands in one place, the
dataclass, and a wrong key or value dies in `freeze` with the key, the value and the way out.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import ml_collections

T = TypeVar("T")


def freeze(cls: type[T], config: Mapping[str, Any], path: str = "config") -> T:
    """The frozen dataclass `cls` with the values of `config`; nested dataclasses are frozen in
    turn.

    Args:
      cls: a frozen dataclass whose fields are scalars, tuples, dataclasses, `X | None` of these, or
        one of several dataclasses (`X | Y`) that their defaults of the field `kind` tell apart.
      config: ConfigDict or mapping; a field it lacks keeps the dataclass's default.
      path: what to call `config` in messages, for example "config.model".

    Raises:
      ValueError: for a key `cls` lacks or a value of another type, naming key, value and what is
        taken.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in config:
        if key not in fields:
            raise ValueError(
                f"{path} has no field {key!r}{did_you_mean(key, fields)}; "
                f"{cls.__name__} takes {sorted(fields)}"
            )
    values = {key: _convert(hints[key], value, f"{path}.{key}") for key, value in config.items()}
    return cls(**values)


def unfreeze(value: Any) -> Any:
    """`freeze` backwards: a dataclass becomes a type-safe ConfigDict, field by field; other values
    stay."""
    if isinstance(value, Mapping):
        return ml_collections.ConfigDict({key: unfreeze(item) for key, item in value.items()})
    if not dataclasses.is_dataclass(value):
        return value
    config = ml_collections.ConfigDict()
    for field in dataclasses.fields(value):
        entry = unfreeze(getattr(value, field.name))
        hint = typing.get_type_hints(type(value))[field.name]
        if entry is None and (plain := _scalar_of(hint)):
            entry = ml_collections.config_dict.placeholder(plain)
        config[field.name] = entry
    return config


def did_you_mean(key: str, known: Mapping[str, Any] | list[str]) -> str:
    """` (did you mean 'experts'?)` when one of the `known` keys is close to `key`, else the empty
    string."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse_args(text: str | None, defaults: dict[str, Any]) -> ml_collections.ConfigDict:
    """Reads the arguments of a config file, `--config=FILE.py:phase=distill,module=2`.

    Args:
      text: `key=value` pairs separated by commas; a comma inside a value is written `+`
        (`module=0+3`).
      defaults: every argument the file takes, with its default, whose type the value must have.

    Raises:
      ValueError: for an unknown argument or a value that is not of the default's type.
    """
    args = dict(defaults)
    for pair in filter(None, (text or "").split(",")):
        key, equals, value = pair.partition("=")
        if key not in defaults or not equals:
            raise ValueError(
                f"config argument {pair!r} is not understood{did_you_mean(key, defaults)}; "
                f"write key=value with a key of {sorted(defaults)}"
            )
        kind = type(defaults[key])
        try:
            args[key] = _BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise ValueError(
                f"config argument {key}={value!r} must be a {kind.__name__}, "
                f"as its default {defaults[key]!r} is"
            ) from None
    return ml_collections.ConfigDict(args)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for every leaf of a nested mapping, in key order."""
    for key in sorted(config):
        value = config[key]
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line a leaf that differs, `key: old -> new`; a key that one side lacks shows as
    `(absent)`."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return [
        f"{key}: {before.get(key, '(absent)')!r} -> {after.get(key, '(absent)')!r}"
        for key in sorted(before | after)
        if before.get(key, "(absent)") != after.get(key, "(absent)")
    ]


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _scalar_of(hint: Any) -> type | None:
    """int for `int | None`, and so on; None where the hint is not an optional scalar."""
    plain = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    return plain[0] if len(plain) == 1 and plain[0] in (int, float, str, bool) else None


def _choose(choices: list[Any], value: Any, path: str) -> Any:
    """The type of `X | Y` that a section is of: the one whose default `kind` it has, or the first
    where it names none."""
    if len(choices) == 1 or dataclasses.is_dataclass(value):
        return type(value) if type(value) in choices else choices[0]
    kinds = {choice.kind: choice for choice in choices}
    kind = value.get("kind", choices[0].kind)
    if kind not in kinds:
        raise ValueError(
            f"{path}.kind={kind!r} must be one of {sorted(kinds)}{did_you_mean(str(kind), kinds)}"
        )
    return kinds[kind]


def _convert(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, ml_collections.FieldReference):
        value = value.get()
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        plain = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        if value is None:
            return None
        return _convert(_choose(plain, value, path), value, path)
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value):
            return value
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise ValueError(
                f"{path}={value!r} must be a section with the fields of {hint.__name__}"
            )
        return freeze(hint, value, path)
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ValueError(f"{path}={value!r} must be a tuple; write it as ({value},)")
        element = typing.get_args(hint)[0]
        return tuple(_convert(element, item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        element = typing.get_args(hint)[1]
        return {key: _convert(element, item, f"{path}.{key}") for key, item in value.items()}
    if value is None:
        raise ValueError(f"{path}=None must be a {getattr(hint, '__name__', hint)}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ValueError(
            f"{path}={value!r} must be of type {hint.__name__}, not {type(value).__name__}"
        )
    return value
