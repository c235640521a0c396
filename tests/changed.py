"""Frozen configs with one field changed, however deep it is."""

import dataclasses
from typing import TypeVar

Section = TypeVar("Section")


def changed(path: str, value: object, config: Section) -> Section:
    """The config with another value of the field at `path`, such as "model.moe.chosen"."""
    name, _, below = path.partition(".")
    if below:
        value = changed(below, value, getattr(config, name))
    return dataclasses.replace(config, **{name: value})
