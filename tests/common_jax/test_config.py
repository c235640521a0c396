"""ConfigDicts and frozen dataclasses: accepted values, and error messages."""

import dataclasses
import math
import pathlib

import ml_collections
import pytest

from common_jax.command_line import set_field
from common_jax.config import (
    FieldError,
    Section,
    difference,
    flatten,
    freeze,
    in_recipe,
    parse_args,
    renamed,
    under,
    unfreeze,
)
from common_jax.ranges import Fraction, Regex, Size, Sizes


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


@dataclasses.dataclass(frozen=True)
class Heads(Section):
    heads: Size = 2
    width: Size = 8
    rate: Fraction = 0.5
    limit: Fraction | None = None
    sides: Sizes = (1,)
    paths: Regex = ""

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise FieldError(f"heads={self.heads} must divide width={self.width}")


@dataclasses.dataclass(frozen=True)
class Both(Section):
    first: Heads = Heads()
    second: Heads = Heads()
    named: dict[str, Heads] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ring(Section):
    kind: str = "ring"
    size: Size = 3


@dataclasses.dataclass(frozen=True)
class Star(Section):
    kind: str = "star"
    size: Size = 5
    centre: bool = True


@dataclasses.dataclass(frozen=True)
class Graph(Section):
    shape: Ring | Star = Ring()
    grid: tuple[tuple[int, ...], ...] = ()
    rate: float | None = None
    name: str | None = None


def test_kind_selects_the_section_and_defaults_to_the_first():
    assert freeze(Graph, {"shape": {"kind": "star", "size": 7}}).shape == Star(size=7)
    assert freeze(Graph, {"shape": {"size": 7}}).shape == Ring(size=7)
    assert freeze(Graph, {}).shape == Ring()
    assert freeze(Graph, unfreeze(Graph(Star(centre=False)))) == Graph(Star(centre=False))
    with pytest.raises(
        ValueError, match=r"config\.shape\.kind='stra' must be one of \['ring', 'star'"
    ):
        freeze(Graph, {"shape": {"kind": "stra"}})
    with pytest.raises(ValueError, match=r"config\.shape has no field 'centre'.*Ring takes"):
        freeze(Graph, {"shape": {"centre": True}})


def test_flag_that_changes_only_the_kind_is_told_to_replace_the_section():
    config = unfreeze(Graph(Star()))
    config.shape.kind = "ring"
    said = (
        r"config\.shape\.kind='ring' has no field 'centre': .* --config\.shape=\"{'kind': 'ring'}\""
    )
    with pytest.raises(ValueError, match=said):
        freeze(Graph, config)
    set_field(config, "shape", "{'kind': 'ring'}")
    assert freeze(Graph, config) == Graph(Ring())


def test_lists_become_tuples_and_references_are_resolved():
    assert freeze(Graph, {"grid": [[1, 2], [3]]}).grid == ((1, 2), (3,))
    config = ml_collections.ConfigDict({"rate": ml_collections.FieldReference(0.5)})
    assert freeze(Graph, config).rate == 0.5
    with pytest.raises(ValueError, match=r"config\.grid\[1\]\[0\]='a' must be of type int"):
        freeze(Graph, {"grid": [[1], ["a"]]})


def test_field_that_may_be_none_accepts_its_type_later():
    config = unfreeze(Graph())
    config.rate, config.name = 2, "a"  # an integer for a float
    assert freeze(Graph, config) == Graph(rate=2.0, name="a")
    assert type(freeze(Graph, {"rate": 2}).rate) is float
    assert freeze(Graph, {"rate": None, "name": None}) == Graph()
    with pytest.raises(TypeError):
        unfreeze(Graph()).rate = "a"
    with pytest.raises(ValueError, match=r"config\.shape=None must be a section"):
        freeze(Graph, {"shape": None})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.1e9])
def test_numbers_without_a_range_must_be_finite(value):
    with pytest.raises(ValueError, match=r"config\.rate=.* must be (a finite number|at most)"):
        freeze(Graph, {"rate": value})


def test_round_trip_keeps_values_and_types():
    value = Outer(Inner(4, 0.25), (1, 2), 1.0, {"a": Inner(2)})
    assert freeze(Outer, unfreeze(value)) == value
    assert freeze(Outer, unfreeze(value).to_dict()) == value


def test_optional_field_can_be_set_after_unfreezing():
    config = unfreeze(Outer())
    config.clip = 2.0
    assert freeze(Outer, config).clip == 2.0


def test_misspelt_key_error_names_the_section_and_suggests_a_key():
    with pytest.raises(
        ValueError, match=r"config\.moe has no field 'expert' .*did you mean 'experts'"
    ):
        freeze(Outer, {"moe": {"expert": 4}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"moe": {"experts": 4.5}}, r"config\.moe\.experts=4\.5 must be of type int, not float"),
        ({"moe": {"experts": True}}, r"config\.moe\.experts=True must be of type int"),
        ({"moe": {"rate": True}}, r"config\.moe\.rate=True must be of type float"),
        ({"depths": 3}, r"config\.depths=3 must be a tuple"),
        ({"depths": ("a",)}, r"config\.depths\[0\]='a' must be of type int"),
        ({"moe": 3}, r"config\.moe=3 must be a section"),
    ],
)
def test_invalid_values_are_reported(config, message):
    with pytest.raises(ValueError, match=message):
        freeze(Outer, config)


def test_integer_is_accepted_for_a_float():
    assert freeze(Outer, {"moe": {"rate": 1}}).moe.rate == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"first": {"rate": 2}}, "config.first.rate=2 must be in [0, 1]"),
        ({"second": {"rate": 2.0}}, "config.second.rate=2.0 must be in [0, 1]"),
        ({"named": {"a": {"rate": -1}}}, "config.named.a.rate=-1 must be in [0, 1]"),
        ({"first": {"limit": float("nan")}}, "config.first.limit=nan must be in [0, 1], or None"),
        (
            {"first": {"limit": "x"}},
            "config.first.limit='x' must be of type float or None",
        ),
        ({"first": {"sides": (4, 0)}}, "config.first.sides[1]=0 must be at least 1"),
        ({"first": {"sides": ()}}, "config.first.sides=() must be a non-empty tuple"),
        ({"second": {"heads": 3}}, "config.second.heads=3 must divide width=8"),
        ({"named": {"a": {"heads": 3}}}, "config.named.a.heads=3 must divide width=8"),
        ({"second": None}, "config.second=None must be a section with the fields of Heads"),
        ({"second": Both()}, "config.second=Both("),
        ({"named": 3}, "config.named=3 must be a section"),
        (
            {"first": {"paths": "(a"}},
            "config.first.paths='(a' must be a regular expression",
        ),
        ({"first": {"width": 2**31}}, "config.first.width=2147483648 must be at most 2147483647"),
        ({"first": {"heads": 10**5000}}, "config.first.heads=a number of 16610 bits must be at"),
    ],
)
def test_out_of_range_value_is_reported_with_its_path_once(config, message):
    with pytest.raises(ValueError) as error:
        freeze(Both, config)
    assert str(error.value).startswith(message)
    assert str(error.value).count("config.") == 1
    assert len(str(error.value)) < 500


def test_section_built_in_python_is_validated_too():
    with pytest.raises(FieldError, match=r"^rate=2\.0 must be in \[0, 1\]$"):
        Heads(rate=2.0)
    with pytest.raises(FieldError, match=r"^heads=3 must divide width=8$"):
        dataclasses.replace(Heads(), heads=3)
    with pytest.raises(ValueError, match=r"^config\.a\.heads=3 must"), under("config.a"):
        Heads(heads=3)


def test_long_value_is_truncated_in_the_message():
    with pytest.raises(ValueError, match=r"^config\.first\.paths='\(aaa") as error:
        freeze(Both, {"first": {"paths": "(" + "a" * 10_000}})
    assert len(str(error.value)) < 500


def test_renamed_rewrites_config_keys_in_errors():
    keys = {"config.optim": "config.recipes.distill.optim"}
    with pytest.raises(FileNotFoundError) as error, renamed(keys):
        raise FileNotFoundError("config.optim.batch=8, or config.recipes.distill.optim.steps")
    assert str(error.value) == (
        "config.recipes.distill.optim.batch=8, or config.recipes.distill.optim.steps"
    )
    with pytest.raises(FileNotFoundError, match=r"No such file.*config\.optim"), renamed(keys):
        pathlib.Path("/nowhere/config.optim").read_text()


def test_difference_lists_changed_and_absent_leaves():
    old, new = {"a": {"b": 1, "c": (1, 2)}}, {"a": {"b": 2, "c": [1, 2]}, "d": 0}
    assert difference(old, new) == ["a.b: 1 -> 2", "d: '(absent)' -> 0"]


def test_flatten_gives_dotted_names_in_order():
    config = {"b": {"d": (1,), "c": {}}, "a": ml_collections.ConfigDict({"x": None})}
    assert list(flatten(config)) == [("a.x", None), ("b.d", [1])]
    assert difference({"a": None}, {}) == ["a: None -> '(absent)'"]


def test_in_recipe_prefixes_fields_in_errors():
    with pytest.raises(ValueError) as error, in_recipe(Both, "distill"):
        raise ValueError("config.first.heads=3 and config.mesh.data=2")
    assert str(error.value) == "config.recipes.distill.first.heads=3 and config.mesh.data=2"


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("Yes", True), ("1", True), ("false", False), ("NO", False)]
)
def test_boolean_config_arguments_are_parsed(text, value):
    assert parse_args(f"flag={text}", {"flag": not value}).flag is value
    assert parse_args("", {"flag": value}).flag is value
    assert parse_args(None, {"flag": value}).flag is value


def test_config_arguments_keep_the_type_of_their_default():
    assert parse_args("name=a=b,name=c+d", {"name": "", "other": 1}).to_dict() == {
        "name": "c+d",
        "other": 1,
    }
    args = parse_args("phase=distill,size=3,flag=true", {"phase": "", "size": 1, "flag": False})
    assert (args.phase, args.size, args.flag) == ("distill", 3, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [("phas=x", "did you mean 'phase'"), ("phase", "write key=value"), ("size=x", "must be a int")],
)
def test_invalid_config_arguments_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_args(text, {"phase": "", "size": 1})
