"""ConfigDict outside, frozen dataclasses inside: what is accepted, and what the refusals say."""

import dataclasses

import pytest

from common_jax.config import difference, freeze, parse_args, unfreeze


@dataclasses.dataclass(frozen=True)
class Inner:
    experts: int = 8
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    moe: Inner = Inner()
    depths: tuple[int, ...] = (3, 3)
    clip: float | None = None
    table: dict[str, Inner] = dataclasses.field(default_factory=dict)


def test_round_trip_keeps_values_and_types():
    value = Outer(Inner(4, 0.25), (1, 2), 1.0, {"a": Inner(2)})
    assert freeze(Outer, unfreeze(value)) == value
    assert freeze(Outer, unfreeze(value).to_dict()) == value


def test_optional_field_can_be_set_after_unfreezing():
    config = unfreeze(Outer())
    config.clip = 2.0
    assert freeze(Outer, config).clip == 2.0


def test_misspelt_key_names_the_section_and_the_close_one():
    with pytest.raises(
        ValueError, match=r"config\.moe has no field 'expert' .*did you mean 'experts'"
    ):
        freeze(Outer, {"moe": {"expert": 4}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"moe": {"experts": 4.5}}, r"config\.moe\.experts=4\.5 must be of type int, not float"),
        ({"moe": {"experts": True}}, r"config\.moe\.experts=True must be of type int"),
        ({"depths": 3}, r"config\.depths=3 must be a tuple"),
        ({"depths": ("a",)}, r"config\.depths\[0\]='a' must be of type int"),
        ({"moe": 3}, r"config\.moe=3 must be a section"),
    ],
)
def test_wrong_values_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        freeze(Outer, config)


def test_an_integer_may_stand_for_a_float():
    assert freeze(Outer, {"moe": {"rate": 1}}).moe.rate == 1.0


def test_difference_names_changed_and_absent_leaves():
    old, new = {"a": {"b": 1, "c": (1, 2)}}, {"a": {"b": 2, "c": [1, 2]}, "d": 0}
    assert difference(old, new) == ["a.b: 1 -> 2", "d: '(absent)' -> 0"]


def test_config_arguments_keep_the_type_of_their_default():
    args = parse_args("phase=distill,size=3,flag=true", {"phase": "", "size": 1, "flag": False})
    assert (args.phase, args.size, args.flag) == ("distill", 3, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [("phas=x", "did you mean 'phase'"), ("phase", "write key=value"), ("size=x", "must be a int")],
)
def test_config_arguments_that_are_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_args(text, {"phase": "", "size": 1})
