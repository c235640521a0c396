"""Fields of a config by their paths, and the values that the text of a flag means there."""

import ast
import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from common_jax.config import BOOLEANS, did_you_mean, freeze, unfreeze

T = TypeVar("T")

NOTHING = "None"  # the text for the absence of a value
EXACT = 2**53  # up to here a float holds every whole number
SHOWN = 6  # paths in a message
# Errors of `ast.literal_eval` for text that is no literal, or too deep for the parser.
NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def set_field(config: ml_collections.ConfigDict, path: str, text: str) -> None:
    """Sets the field at `path` to the value that `text` means for its type.

    "None" is the absence of a value for every type. A section accepts a dict, which replaces it.
    Raises ValueError for a path without a field, or text of another type, naming both.
    """
    check_field(config, path)
    set_value(config, path, convert(type_of(config, path), text, path))


def change_config(
    config: T,
    settings: Mapping[str, str],
    *,
    changeable: Sequence[str],
    fixed: Sequence[str] = (),
) -> T:
    """The config of a trained network with fields set from text.

    Args:
      config: a frozen dataclass.
      settings: text by the path of a field.
      changeable: sections and fields that do not make the network.
      fixed: fields of these sections that do.

    Raises:
      ValueError: for any other field, or text of another type.
    """
    changed = unfreeze(config)
    for path, text in settings.items():
        inside = any(f"{path}.".startswith(f"{one}.") for one in changeable)
        if not inside or path in fixed:
            left_out = f", except {' and '.join(fixed)}" if fixed else ""
            raise ValueError(
                f"--config.{path}={text} would make another network than was trained; what can be "
                f"changed is {', '.join(changeable)}{left_out}"
            )
        set_field(changed, path, text)
    return freeze(type(config), changed)


def check_field(config: ml_collections.ConfigDict, path: str) -> None:
    """Raises ValueError unless the path of a flag, `a.b` of `--config.a.b=1`, is of a field."""
    section, name = config, "config"
    for key in path.split("."):
        if not isinstance(section, ml_collections.ConfigDict):
            raise ValueError(f"--config.{shorten(path)}: {name} is a value and has no fields")
        if key not in section:
            known = list(section)
            hint = (
                _meant(find_paths(config, path))
                or did_you_mean(key, known)
                or _meant(find_paths(config, path.rpartition(".")[2]))
            )
            raise ValueError(
                f"--config.{shorten(path)}: {name} has no field {shorten(key)!r}{hint}; "
                f"it takes {sorted(known)}"
            )
        section, name = section[key], f"{name}.{key}"


def type_of(config: ml_collections.ConfigDict, path: str) -> type:
    """The type of the values of a field; NoneType where it is unknown."""
    section, key = _section_of(config, path)
    return section.get_type(key)


def set_value(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
    """Sets a field to a value of its type, or to None, in a locked config too. Raises ValueError
    where the field's section was replaced by something without such a section."""
    try:
        section, key = _section_of(config, path)
    except (KeyError, TypeError):
        section = None
    if not isinstance(section, ml_collections.ConfigDict):
        raise ValueError(
            f"--config.{path}: a flag before it replaced the section that the field is in; set "
            "both at once there, or leave out one"
        )
    # ConfigDict would refuse a value where the config file has None without a type.
    with section.unlocked(), section.ignore_type():
        section[key] = value


def find_paths(config: ml_collections.ConfigDict, end: str) -> list[str]:
    """The paths of all fields, sections among them, that end in the path `end`."""
    return [path for path in _paths(config) if end and f".{path}".endswith(f".{end}")]


def either(paths: Sequence[str]) -> str:
    """The flags of these paths, joined by "or"; of many the first ones."""
    more = f" or {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return " or ".join(f"--config.{path}" for path in paths[:SHOWN]) + more


def convert(kind: type, text: str, path: str) -> Any:
    """The value that `text` means for a field of type `kind`; any literal where that is NoneType.
    Raises ValueError, with the field's path, for text without a meaning there."""
    if text == NOTHING:
        return None
    if issubclass(kind, ml_collections.ConfigDict):
        return _section(text, path)
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise _wrong(path, text, "true or false")
        return BOOLEANS[text.lower()]
    if kind is int:
        return _whole_number(text, path)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise _wrong(path, text, "a number") from None
    if kind is str:
        return text
    if kind in (tuple, list):
        return kind(_sequence(text, path))
    return _literal(text)


def shorten(text: str, length: int = 200) -> str:
    """Printable text of a bounded length."""
    plain = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return plain if len(plain) <= length else f"{plain[:length]}..."


def _whole_number(text: str, path: str) -> int:
    """Digits, or an exact number such as 1e3."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        number = float(text)
        if "e" in text.lower() and number.is_integer() and abs(number) <= EXACT:
            return int(number)
    raise _wrong(path, text, "a whole number")


def _sequence(text: str, path: str) -> Sequence[Any]:
    """A tuple or list; text that is neither is a tuple of one item."""
    value = _literal(text)
    is_open = value is text and (text.strip() or "(")[0] in "([{"  # as (1,2 without its bracket
    if is_open or isinstance(value, dict | set):
        raise _wrong(path, text, "a tuple, such as (1,2) or ('a','b'); () is the empty one")
    return value if isinstance(value, tuple | list) else (value,)


def _section(text: str, path: str) -> ml_collections.ConfigDict:
    value = _literal(text)
    try:
        if not isinstance(value, dict) or not _has_text_keys(value):
            raise ValueError
        return ml_collections.ConfigDict(value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"--config.{path}={shorten(text)}: config.{path} is a section; set its fields, "
            f"--config.{path}.FIELD=VALUE, or give a dict in its place"
        ) from None


def _has_text_keys(value: dict) -> bool:
    return all(
        isinstance(key, str) and (not isinstance(item, dict) or _has_text_keys(item))
        for key, item in value.items()
    )


def _literal(text: str) -> Any:
    """The Python literal in `text`; `text` itself if it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about backslashes, as in paths and regexes
        try:
            return ast.literal_eval(text)
        except NO_LITERAL:
            return text


def _wrong(path: str, text: str, expected: str) -> ValueError:
    return ValueError(f"--config.{path}={shorten(text)} must be {expected}")


def _meant(paths: Sequence[str]) -> str:
    return f" (did you mean {either(paths)}?)" if paths else ""


def _paths(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
    for key in config:
        yield f"{prefix}{key}"
        if isinstance(config[key], ml_collections.ConfigDict):
            yield from _paths(config[key], f"{prefix}{key}.")


def _section_of(
    config: ml_collections.ConfigDict, path: str
) -> tuple[ml_collections.ConfigDict, str]:
    *sections, key = path.split(".")
    for name in sections:
        config = config[name]
    return config, key
