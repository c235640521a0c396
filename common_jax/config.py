"""ConfigDict outside, frozen dataclasses inside.

A config file turns the defaults of a dataclass into a `ConfigDict` (`unfreeze`), flags change it,
and a run turns it back once, at the top (`freeze`). A default is therefore written in one place,
the dataclass, next to its range (`common_jax.ranges`). A wrong key or value is caught by `freeze`,
whose message names the key, the value and what is expected.
"""

import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

import ml_collections

from common_jax.ranges import FINITE, did_you_mean, shown

T = TypeVar("T")


class FieldError(ValueError):
    """A value that a section does not allow. The message begins with the name of a field of that
    section, as in `heads=7 must divide width=64`; `under` prepends the section's path."""


class Section:
    """Base class of all config dataclasses: a value of the wrong type or out of range raises
    FieldError.

    A subclass that checks fields against each other does so in its own `__post_init__`, after
    calling this one.
    """

    def __post_init__(self):
        for name, hint in _hints(type(self)).items():
            _convert(hint, getattr(self, name), name)


@contextlib.contextmanager
def under(path: str) -> Iterator[None]:
    """Prepends `path` to the field that a FieldError names, and reraises it as a ValueError, so
    that no outer `under` prepends another path."""
    try:
        yield
    except FieldError as error:
        raise ValueError(f"{path}.{error}") from None


@contextlib.contextmanager
def renamed(keys: Mapping[str, str]) -> Iterator[None]:
    """Replaces the names of config keys in the messages of user errors."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            message = error.args[0]
            for key, other in keys.items():
                message = message.replace(key, other)
            # Changed in place, so that type, attributes and traceback of the exception stay.
            error.args = (message,)
        raise


def in_recipe(recipe: type, name: str) -> contextlib.AbstractContextManager[None]:
    """`renamed` for one run of a pipeline: messages name the fields of the dataclass `recipe` as
    `config.recipes.NAME.FIELD`, which is where the user sets them."""
    fields = (field.name for field in dataclasses.fields(recipe))
    return renamed({f"config.{field}": f"config.recipes.{name}.{field}" for field in fields})


def freeze(cls: type[T], config: Mapping[str, Any], path: str = "config") -> T:
    """The frozen dataclass `cls` with the values of `config`; nested dataclasses are frozen too.

    Args:
      cls: a frozen dataclass whose fields are scalars, tuples, dataclasses, `X | None` of these, or
        one of several dataclasses (`X | Y`), told apart by their field `kind`.
      config: ConfigDict or mapping; missing fields keep the dataclass's default.
      path: the name of `config` in messages, for example "config.model".

    Raises:
      ValueError: for a key that `cls` lacks, a value of the wrong type or out of range, and values
        that contradict each other; names the key, the value and the expected range.
    """
    hints = _hints(cls)
    for key in config:
        if key not in hints:
            raise ValueError(
                f"{path} has no field {shown(key)}{did_you_mean(key, hints)}; "
                f"{cls.__name__} takes {sorted(hints)}"
            )
    with under(path):
        values = {key: _convert(hints[key], value, key, path) for key, value in config.items()}
        return cls(**values)


def unfreeze(value: Any) -> Any:
    """The inverse of `freeze`: a dataclass becomes a type-safe ConfigDict, field by field; other
    values are returned unchanged."""
    if isinstance(value, Mapping):
        return ml_collections.ConfigDict({key: unfreeze(item) for key, item in value.items()})
    if not dataclasses.is_dataclass(value):
        return value
    config = ml_collections.ConfigDict()
    for name, hint in _hints(type(value)).items():
        entry = unfreeze(getattr(value, name))
        if entry is None and (plain := _scalar_of(hint)):
            entry = ml_collections.config_dict.placeholder(plain)
        config[name] = entry
    return config


def parse_args(text: str | None, defaults: dict[str, Any]) -> ml_collections.ConfigDict:
    """Reads the arguments of a config file, `--config=FILE.py:size=large,layer=2`.

    Raises ValueError for an unknown argument or a value that is not of the default's type.

    Args:
      text: `key=value` pairs separated by commas; a comma inside a value is written `+`
        (`layer=0+3`).
      defaults: every argument of the file with its default; a value must have the same type.
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
            args[key] = BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise ValueError(
                f"config argument {key}={value!r} must be a {kind.__name__}, "
                f"as its default {defaults[key]!r} is"
            ) from None
    return ml_collections.ConfigDict(args)


def is_set(config: Any, path: str) -> bool:
    """Whether a field or a section of a frozen config, such as "optim.clip" or
    "recipes.clip.label_smoothing", differs from its default."""
    *above, name = path.split(".")
    section = functools.reduce(
        lambda at, key: at[key] if isinstance(at, Mapping) else getattr(at, key), above, config
    )
    return getattr(section, name) != getattr(type(section)(), name)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for every leaf of a nested mapping, in key order."""
    for key in sorted(config):
        value = config[key]
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per leaf that differs, `key: old -> new`; a key that one side lacks shows as
    `(absent)`."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return [
        f"{key}: {before.get(key, '(absent)')!r} -> {after.get(key, '(absent)')!r}"
        for key in sorted(before | after)
        if before.get(key, "(absent)") != after.get(key, "(absent)")
    ]


BOOLEANS = {"true": True, "t": True, "1": True, "yes": True} | {
    "false": False, "f": False, "0": False, "no": False,
}  # fmt: skip


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The type of every field of a dataclass, with its range."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _scalar_of(hint: Any) -> type | None:
    """int for `int | None`, and so on; None if the hint is not an optional scalar."""
    plain = [_bare(arg) for arg in typing.get_args(hint) if arg is not types.NoneType]
    return plain[0] if len(plain) == 1 and plain[0] in (int, float, str, bool) else None


def _bare(hint: Any) -> Any:
    """The type without its range."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _convert(hint: Any, value: Any, name: str, path: str | None = None) -> Any:
    """Converts a value of a config to what the dataclass holds.

    Args:
      hint: the field's type, with its range.
      value: the value in the config.
      name: the field's name within its section.
      path: the section's path; None if `value` is already in a dataclass.

    Raises FieldError for a wrong value, and ValueError, with the full path, for one in a nested
    section.
    """
    if isinstance(value, ml_collections.FieldReference):
        value = value.get()
    plain = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        plain = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        if value is None and len(plain) < len(typing.get_args(hint)):
            return None
    or_none = ", or None" if types.NoneType in typing.get_args(hint) else ""
    ranges = typing.get_args(plain[0])[1:] if typing.get_origin(plain[0]) is Annotated else ()
    bare = _bare(plain[0])
    if dataclasses.is_dataclass(bare):
        return _convert_section(plain, value, name, path)
    origin = typing.get_origin(bare) or bare
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise FieldError(f"{name}={shown(value)} must be a tuple; write it as (a, b) or (a,)")
        element, items = typing.get_args(bare)[0], enumerate(value)
        converted = tuple(_convert(element, item, f"{name}[{i}]", path) for i, item in items)
    elif origin in (dict, Mapping):
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise FieldError(f"{name}={shown(value)} must be a section")
        element = typing.get_args(bare)[1]
        return {key: _convert(element, item, f"{name}.{key}", path) for key, item in value.items()}
    else:
        converted = _convert_scalar(bare, value, name, " or None" if or_none else "")
    for allowed in ranges or ((FINITE,) if bare is float else ()):
        if (refusal := allowed.refusal(converted)) is not None:
            raise FieldError(f"{name}={shown(value)} must be {refusal}{or_none}")
    return converted


def _convert_section(choices: list[Any], value: Any, name: str, path: str | None) -> Any:
    """Converts the value of a field whose type is a dataclass, or one of several."""
    if isinstance(value, tuple(choices)):
        return value
    if path is None or not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise FieldError(
            f"{name}={shown(value)} must be a section with the fields of "
            f"{' or '.join(choice.__name__ for choice in choices)}"
        )
    chosen = choices[0]
    if len(choices) > 1:
        kinds = {choice.kind: choice for choice in choices}
        kind = value.get("kind", chosen.kind)
        if not isinstance(kind, str) or kind not in kinds:
            raise FieldError(
                f"{name}.kind={shown(kind)} must be one of {list(kinds)}{did_you_mean(kind, kinds)}"
            )
        chosen = kinds[kind]
        others = set().union(*map(_hints, choices)) - _hints(chosen).keys()
        if "kind" in value and (left := [key for key in value if key in others]):
            raise FieldError(
                f"{name}.kind={kind!r} has no field {left[0]!r}: changing the kind alone leaves "
                "the fields of the kind before. Replace the whole section, in the config file or "
                f"""with --{path}.{name}="{{'kind': {kind!r}}}", and set its fields there"""
            )
    return freeze(chosen, value, f"{path}.{name}")


def _convert_scalar(kind: Any, value: Any, name: str, or_none: str) -> Any:
    if value is None and kind is not Any:
        raise FieldError(f"{name}=None must be of type {getattr(kind, '__name__', kind)}")
    if kind is float and type(value) is int:
        # float() overflows on larger integers. Left as an int, the value is out of every range.
        return float(value) if abs(value) < 2**1023 else value
    if kind in (int, float, str, bool) and type(value) is not kind:
        raise FieldError(
            f"{name}={shown(value)} must be of type {kind.__name__}{or_none}, not "
            f"{type(value).__name__}"
        )
    return value
