"""Kinds of networks for meta models, teachers and students: one entry of `FAMILIES` each."""

import functools
import operator
import types
from collections.abc import Mapping
from typing import Any

from m2mkd_jax.families import nac, vit, vmoe
from m2mkd_jax.families.family import Context, Family

__all__ = ["FAMILIES", "Context", "Family", "family_of", "kind_of", "section_type"]

FAMILIES: Mapping[str, Family] = types.MappingProxyType(
    {
        "vit": vit.FAMILY,
        "vmoe": vmoe.FAMILY,
        "nac": nac.FAMILY,
    }
)


def kind_of(section: Any) -> str:
    """The name of the family that a section of the config, such as config.model, belongs to."""
    # `is`, not isinstance: a VMoEConfig is a ViTConfig too.
    return next(kind for kind, family in FAMILIES.items() if family.config is type(section))


def family_of(section: Any) -> Family:
    """The family that a section of the config, such as config.model, belongs to."""
    return FAMILIES[kind_of(section)]


def section_type(role: str) -> Any:
    """The type of config section "meta", "teacher" or "model": the union of the config types of all
    families that can fill it."""
    return functools.reduce(
        operator.or_, (family.config for family in FAMILIES.values() if role in family.roles)
    )
