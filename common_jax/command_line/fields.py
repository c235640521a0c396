"""Config fields by path, and the conversion of a flag's text to a field's type."""

import ast
import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from common_jax.config import BOOLEANS, did_you_mean, freeze, unfreeze

T = TypeVar("T")

NOTHING = "None"  # the text for no value
EXACT = 2**53  # floats are exact for integers up to this
SHOWN = 6  # paths listed in a message
# Errors of `ast.literal_eval` for text that is not a literal, or nested too deep for the parser.
NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def set_field(config: ml_collections.ConfigDict, path: str, text: str) -> None:
    """Sets the field at `path` to `text`, converted to the field's type.

    "None" means no value for every type. A section accepts a dict, which replaces it. Raises
    ValueError for an unknown path, or text of the wrong type, naming both.
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
    """The config of a trained network with some fields set from text.

    Args:
      config: a frozen dataclass.
      settings: text by field path.
      changeable: sections and fields that do not define the network.
      fixed: fields in these sections that do.

    Raises:
      ValueError: for any other field, or text of the wrong type.
    """
    changed = unfreeze(config)
    for path, text in settings.items():
        inside = any(f"{path}.".startswith(f"{one}.") for one in changeable)
        if not inside or path in fixed:
            left_out = f", except {' and '.join(fixed)}" if fixed else ""
            raise ValueError(
                f"--config.{path}={text} is fixed by the run that trained the network; only these "
                f"can be changed: {', '.join(changeable)}{left_out}"
            )
        set_field(changed, path, text)
    return freeze(type(config), changed)


def check_field(config: ml_collections.ConfigDict, path: str) -> None:
    """Raises ValueError unless there is a field at a flag's path, such as `a.b` in
    `--config.a.b=1`."""
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
    """The type of a field's values; NoneType if unknown."""
    section, key = _section_of(config, path)
    return section.get_type(key)


def set_value(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
    """Sets a field to a value of its type, or to None, even in a locked config. Raises ValueError
    if a section on the path was replaced by something without the field's section."""
    try:
        section, key = _section_of(config, path)
    except (KeyError, TypeError):
        section = None
    if not isinstance(section, ml_collections.ConfigDict):
        raise ValueError(
            f"--config.{path}: an earlier flag replaced the section that this field is in; set "
            "both there, or leave one out"
        )
    # Otherwise ConfigDict would refuse a value for a field that the config file sets to plain None.
    with section.unlocked(), section.ignore_type():
        section[key] = value


def find_paths(config: ml_collections.ConfigDict, end: str) -> list[str]:
    """The paths of all fields and sections that end in the path `end`."""
    return [path for path in _paths(config) if end and f".{path}".endswith(f".{end}")]


def either(paths: Sequence[str]) -> str:
    """The flags of these paths, joined by "or"; at most SHOWN of them."""
    more = f" or {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return " or ".join(f"--config.{path}" for path in paths[:SHOWN]) + more


def convert(kind: type, text: str, path: str) -> Any:
    """Converts `text` to a value of type `kind`; to any literal if that is NoneType. Raises
    ValueError, with the field's path, for text that does not fit the type."""
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
    """Makes text printable and truncates it."""
    plain = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return plain if len(plain) <= length else f"{plain[:length]}..."


def _whole_number(text: str, path: str) -> int:
    """Converts digits, or an exact number such as 1e3."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        number = float(text)
        if "e" in text.lower() and number.is_integer() and abs(number) <= EXACT:
            return int(number)
    raise _wrong(path, text, "a whole number")


def _sequence(text: str, path: str) -> Sequence[Any]:
    """Converts text to a tuple or list; anything else becomes a tuple of one item."""
    value = _literal(text)
    is_open = value is text and (text.strip() or "(")[0] in "([{"  # such as (1,2
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
    """The Python literal in `text`; `text` itself if it is not one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about backslashes in paths and regexes
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
