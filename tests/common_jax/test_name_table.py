"""Name tables: entries, the strict reader, and recognition by names."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from common_jax.weights import entries
from common_jax.weights import table as tables
from common_jax.weights.table import Claim, Table


def test_entries_match_their_formulas():
    """For a layer [out, in] with two heads of three."""
    layers = [np.arange(24).reshape(6, 4) + 100 * i for i in range(3)]
    kernel = entries.split_heads(("q", "k", "v"), 2).read(*layers)
    bias = entries.split_heads(("q", "k", "v"), 2).read(*(x[:, 0] for x in layers))
    out = entries.join_heads("out", 2).read(layers[0].T)
    stacked = entries.stacked_attention("self_attn", "attention", heads=2)
    for path, want in (("kernel", kernel), ("bias", bias)):
        whole = np.concatenate([x if path == "kernel" else x[:, 0] for x in layers])
        np.testing.assert_array_equal(stacked[f"attention/qkv/{path}"].read(whole), want)
    assert (kernel.shape, bias.shape, out.shape) == ((4, 3, 2, 3), (3, 2, 3), (2, 3, 4))
    for part, head, place, width in np.ndindex(3, 2, 3, 4):
        value = layers[part][3 * head + place, width]
        assert kernel[width, part, head, place] == value
        assert width or bias[part, head, place] == value
        assert part or out[head, place, width] == value
    conv = np.arange(48).reshape(2, 3, 2, 4)
    kernel = entries.convolution("conv").read(conv)
    for index in np.ndindex(*conv.shape):
        assert kernel[index[2], index[3], index[1], index[0]] == conv[index]


def test_parts_of_a_kernel_may_have_different_types():
    table = Table({"qkv": entries.split_heads(("q", "k", "v"), 2)})
    types = (ml_dtypes.bfloat16, np.float16, np.float32)
    tensors = {name: np.full((6, 4), 1.5, dtype) for name, dtype in zip("qkv", types, strict=True)}
    found, _ = tables.read(table, tensors, shapes={"qkv": np.zeros((4, 3, 2, 3))}, file="f")
    assert found["qkv"].dtype == np.float32 and (found["qkv"] == 1.5).all()


def test_aliases_stand_for_their_tensors_and_zeros_fill_missing_ones():
    needed = {"a": entries.copy("a.weight"), "b": entries.copy("b.weight")}
    table = Table(needed, aliases={"tied.weight": "a.weight"})
    lenient = Table(
        needed | {"b": dataclasses.replace(needed["b"], fill=0.0)}, aliases=table.aliases
    )
    shapes = {"a": np.zeros(2), "b": np.zeros(3)}
    tensors = {"tied.weight": np.ones(2), "b.weight": np.ones(3)}
    given = {"shapes": shapes, "file": "f"}
    found, account = tables.read(table, tensors, **given)
    assert found["a"].tolist() == [1, 1]
    assert account.aliases == (("tied.weight", "a.weight"),)
    with pytest.raises(ValueError, match=r"b\.weight \(3,\) is missing, for b"):
        tables.read(table, {"a.weight": np.ones(2)}, **given)
    found, account = tables.read(lenient, {"a.weight": np.ones(2)}, **given)
    assert (found["b"].tolist(), account.aliases) == ([0, 0, 0], ())
    assert account.notes == ("b.weight is not in the file: zeros",)
    found, account = tables.read(lenient, tensors, **given)
    assert (found["b"].tolist(), account.notes) == ([1, 1, 1], ())
    with pytest.raises(ValueError, match=r"tied\.weight should equal a\.weight and does not"):
        tables.read(table, tensors | {"a.weight": np.zeros(2)}, **given)


def test_missing_optional_tensor_is_filled_with_its_constant():
    gain = dataclasses.replace(entries.copy("ls1.gamma"), fill=1.0)
    table, shapes = Table({"scale": gain}), {"scale": np.zeros(2)}
    found, account = tables.read(table, {}, shapes=shapes, file="f")
    assert found["scale"].tolist() == [1, 1]
    assert account.notes == ("ls1.gamma is not in the file: 1 everywhere",)
    assert tables.misfits(table, []) == []


def test_tied_tensors_are_one_parameter():
    module = entries.linear("layers.0.up", "up")
    table = Table(entries.tied(module, "layers.0.", ("layers.1.", "layers.2.")))
    params = {"up": {"kernel": np.arange(6.0).reshape(3, 2), "bias": np.ones(2)}}
    state = tables.write(table, params)
    assert sorted(state) == [f"layers.{i}.up.{x}" for i in range(3) for x in ("bias", "weight")]
    found, _ = tables.read(table, state, shapes=params, file="f")
    np.testing.assert_array_equal(found["up"]["kernel"], params["up"]["kernel"])
    del state["layers.1.up.bias"]
    with pytest.raises(ValueError, match=r"layers\.1\.up\.bias \(2,\) is missing, for up/bias"):
        tables.read(table, state, shapes=params, file="f")


def test_network_shapes_select_the_entries():
    table = Table({"a": entries.copy("a"), "b": entries.copy("b")}, left_out={"c|d": "of others"})
    tensors = {"a": np.ones(1), "c": np.ones(2)}
    found, account = tables.read(table, tensors, shapes={"a": np.zeros(1)}, file="f")
    assert list(found) == ["a"] and account.dropped == (("c", "of others"),)
    with pytest.raises(
        ValueError, match=r"does not fit this model:\n  b \(3,\) has no place\nwait"
    ):
        tables.read(
            table,
            tensors | {"b": np.ones(3)},
            shapes={"a": np.zeros(1)},
            file="f",
            advice=lambda problems: f"wait for {len(problems)}",
        )
    assert tables.expected_tensors(table, {"b": np.zeros(4)}) == {"b": ("b", (4,))}


def test_prefixed_table_leaves_out_names_below_its_prefix_only():
    table = Table({"a": entries.copy("a")}, {"b": "a"}, {"c|d": "of others"})
    part = table.below(source="net.", target="net/")
    tensors = {"net.b": np.ones(1), "net.c": np.ones(1), "net.d": np.ones(1)}
    found, account = tables.read(part, tensors, shapes={"net": {"a": np.zeros(1)}}, file="f")
    assert found["net"]["a"].tolist() == [1] and account.aliases == (("net.b", "net.a"),)
    assert [name for name, _ in account.dropped] == ["net.c", "net.d"]
    with pytest.raises(ValueError, match=r"d \(1,\) has no place"):
        tables.read(part, tensors | {"d": np.ones(1)}, shapes={"net": {"a": np.zeros(1)}}, file="f")


LARGE = ("large", "a", lambda: [Table({x: entries.copy(x) for x in "abc"})])
SMALL = ("small", "a", lambda: [Table({x: entries.copy(x) for x in "ab"})])


@pytest.mark.parametrize(
    ("names", "claims"),
    [
        ("ab", [("small", "", ()), ("large", "", ("c is missing",))]),
        ("abc", [("large", "", ()), ("small", "", ("c has no place",))]),
        ("bc", []),
    ],
)
def test_table_claiming_the_most_names_ranks_first(names, claims):
    assert tables.rank_kinds([LARGE, SMALL], set(names)) == [Claim(*claim) for claim in claims]


def test_aliases_count_as_their_tensors_in_claims():
    table = Table({"a": entries.copy("a")}, {"b": "a"})
    assert tables.misfits(table, ["b"]) == tables.misfits(table, ["a", "b"]) == []


def test_shortest_prefix_ranks_first():
    ranked = tables.rank_kinds([LARGE, SMALL], {"a", "b", "x.a", "x.b", "x.c"})
    assert [(claim.kind, claim.prefix) for claim in ranked] == [
        ("small", ""),
        ("large", ""),
        ("large", "x."),
        ("small", "x."),
    ]


def test_only_the_first_few_prefixes_are_searched():
    ranked = tables.rank_kinds([SMALL], {f"{i}.a" for i in range(1000)})
    assert [claim.prefix for claim in ranked] == [f"{i}." for i in range(8)]


def test_nearest_kind_is_described():
    described = tables.describe_nearest([LARGE, SMALL], set("bcd"))
    assert described == ""  # two out of three names
    described = tables.describe_nearest([LARGE, SMALL], set("bc"))
    assert described == ". The closest is kind='large':\n  a is missing"


@pytest.mark.parametrize(
    ("names", "chosen", "prefix"),
    [("a", "", ""), ("x.a", "", "x."), ("a x.a", "", ""), ("x.a y.a", "y.", "y."), ("b", "", "")],
)
def test_unambiguous_prefix_is_chosen(names, chosen, prefix):
    assert tables.choose_prefix(["a"], names.split(), chosen, "f") == prefix


def test_ambiguous_prefix_must_be_given():
    with pytest.raises(ValueError, match=r"networks below 'x\.', 'y\.': choose with weights=x"):
        tables.choose_prefix(["a"], ["x.a", "y.a"], "", "f")
    with pytest.raises(ValueError, match=r"no network below weights='z\.'; there are: 'x\.'"):
        tables.choose_prefix(["a"], ["x.a"], "z.", "f")
    own, account = tables.take_prefix({"x.a": 1, "y.a": 2}, "x.")
    assert own == {"a": 1} and account.dropped == (("y.a", "belongs to the rest of the model"),)
