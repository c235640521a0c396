"""Every field of both configs declares what it accepts; the full table is `make test-flags`."""

import dataclasses
import types
import typing

import flags
import pytest

from cliptrans_jax.config import Config as CliptransConfig
from common_jax.config import Section
from m2mkd_jax.config import Config as M2mkdConfig


def sections(cls):
    """All dataclasses in a config's type, itself first."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from sections(part)


def hints(cls):
    """Name and type of all fields and of tuple elements, with their ranges, without None."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            hint = typing.get_args(hint)[0]
        yield name, hint
        bare = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if typing.get_origin(bare) is tuple:
            yield name, typing.get_args(bare)[0]


@pytest.mark.parametrize("config", [M2mkdConfig, CliptransConfig])
def test_every_number_has_a_range(config):
    for cls in set(sections(config)):
        assert issubclass(cls, Section), cls
        bare = [name for name, hint in hints(cls) if hint in (int, float)]
        assert not bare, f"{cls.__name__}: {bare}"


@pytest.mark.parametrize("name", flags.defaults())
def test_every_field_refuses_invalid_values(name):
    counts, misses, _ = flags.try_all({name: flags.defaults()[name]})
    assert counts[name].fields > 150
    assert not misses


def test_a_field_without_a_range_is_a_miss():
    @dataclasses.dataclass(frozen=True)
    class Bare(Section):
        size: int = 1

    _, misses, _ = flags.try_all({"bare": (Bare, {"size": 1})})
    passing = [miss for miss in misses if miss.endswith("passes and is not in the table")]
    assert [miss.split()[1] for miss in passing[:3]] == [
        "config.size=-1",
        "config.size=0",
        "config.size=100000000000000000000",
    ]


@pytest.mark.parametrize(
    ("config", "flag", "beginning"), flags.COMMANDS, ids=[flag for _, flag, _ in flags.COMMANDS]
)
def test_command_line_is_refused_before_anything_is_written(config, flag, beginning, tmp_path):
    assert flags.try_command(config, flag, beginning, tmp_path) is None
