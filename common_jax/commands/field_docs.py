"""Descriptions of config fields, from the docstrings of their dataclasses."""

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from common_jax.ranges import Choice

# The first line of an attribute's entry, `name: text` or `name, other: text`.
ENTRY = re.compile(r"( *)([a-z]\w*(?:, [a-z]\w*)*): (.*)")
# A comment after a field, or on the line above it.
BESIDE = re.compile(r"^    (\w+): .*?# (.*)$", re.MULTILINE)
ABOVE = re.compile(r"^    # (.*)\n    (\w+): ", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Field:
    """A config field: its path, its value, its default in the dataclass (or MISSING), its
    description ("" if there is none), and the values it may have, if they are listed."""

    path: str
    value: Any
    default: Any
    meaning: str
    choices: Sequence[Any]


def list_fields(config: Any, path: str = "config") -> Iterator[Field]:
    """Yields the fields of a frozen dataclass and of all sections in it, in order of definition.

    Sections are expanded even if they are left at their defaults.
    """
    meanings, choices = field_meanings(type(config)), field_choices(type(config))
    for field in dataclasses.fields(config):
        name, value = f"{path}.{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from list_fields(value, name)
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            for key, section in value.items():
                yield from list_fields(section, f"{name}.{key}")
        else:
            meaning = meanings.get(field.name, "")
            yield Field(name, value, field.default, meaning, choices.get(field.name, ()))


def field_meanings(cls: type) -> dict[str, str]:
    """Descriptions of a dataclass's fields, from its docstring, its base classes' docstrings, or
    comments beside the fields."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _from_comments(base) | _from_docstring(base)
    return found


def field_choices(cls: type) -> dict[str, list[Any]]:
    """The values of those fields of a dataclass that may have only some, such as keys of a
    table."""
    hints = typing.get_type_hints(cls, include_extras=True).items()
    # The range of `Annotated[T, range]`, also in `Annotated[T, range] | None` or in a tuple.
    parts = [(name, part) for name, hint in hints for part in (hint, *typing.get_args(hint))]
    ranges = [(name, one) for name, part in parts for one in typing.get_args(part)]
    return {name: one.list() for name, one in ranges if isinstance(one, Choice)}


def _from_docstring(cls: type) -> dict[str, str]:
    names = {field.name for field in dataclasses.fields(cls)}
    found, current, depth = {}, (), 0
    for line in inspect.getdoc(cls).splitlines():
        match = ENTRY.fullmatch(line)
        if match and set(match[2].split(", ")) <= names:
            current, depth = tuple(match[2].split(", ")), len(match[1])
            found |= dict.fromkeys(current, match[3])
        elif line.strip() and len(line) - len(line.lstrip()) > depth and current:
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        else:
            current = ()
    return found


def _from_comments(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:
        return {}
    above = {name: text for text, name in ABOVE.findall(source)}
    return above | dict(BESIDE.findall(source))
