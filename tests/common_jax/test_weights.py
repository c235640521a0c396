"""Warm starts: every parameter comes from its source, or is reported."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import split_mesh

from common_jax.checkpoint import write_params
from common_jax.weights import Allowance, Origin, take

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def filled(*numbers):
    """Parameters of one shape that differ only in value."""
    names = ("first", "second", "third")
    return {
        name: np.full((4, 2), number, np.float32)
        for name, number in zip(names, numbers, strict=False)
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two workdirs with the same shapes."""
    root = tmp_path_factory.mktemp("sources")
    params = {"net": {"stage_1": filled(1, 2, 3), "stage_10": filled(10, 20), "stage": filled(0)}}
    write_params(root / "one", params, config={})
    write_params(root / "two", {"net": {"stage_1": filled(4, 5)}}, config={})
    return root


def wanted(*paths, shape=(4, 2), dtype=jnp.float32, sharding=SHARDING):
    tree = {}
    for path in paths:
        part, _, name = path.rpartition("/")
        leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        tree.setdefault(part, {})[name] = leaf
    return tree


def values(warm):
    """The constant value of every parameter, by path."""
    return {
        f"{part}/{name}": float(np.unique(np.asarray(leaf, np.float32)).item())
        for part, leaves in warm.params.items()
        for name, leaf in leaves.items()
    }


def test_parameters_of_equal_shape_keep_their_names_and_sources(sources):
    targets = [f"{part}/{name}" for part in ("a", "b", "c") for name in ("first", "second")]
    warm = take(
        wanted(*targets, "a/third"),
        [
            Origin(sources / "one", "net/stage_1", "a"),
            Origin(sources / "two", "net/stage_1", "b"),
            Origin(sources / "one", "net/stage_10", "c"),
        ],
    )
    assert values(warm) == {
        "a/first": 1, "a/second": 2, "a/third": 3, "b/first": 4, "b/second": 5, "c/first": 10,
        "c/second": 20,
    }  # fmt: skip
    assert [(entry["as"], entry["subtree"], entry["arrays"]) for entry in _taken(warm)] == [
        ("a", "net/stage_1", 3),
        ("b", "net/stage_1", 2),
        ("c", "net/stage_10", 2),
    ]
    assert [entry["source"] for entry in _taken(warm)] == [
        str(sources / name / "checkpoints" / "0") for name in ("one", "two", "one")
    ]


def _taken(warm):
    return warm.account["taken"]


def test_origin_renames_source_to_target_names(sources):
    renamed = {"first": "second", "second": "third", "third": "new"}
    warm = take(
        wanted("a/second", "a/third", "a/new"),
        [Origin(sources / "one", "net/stage_1", "a", renamed)],
    )
    assert values(warm) == {"a/second": 1, "a/third": 2, "a/new": 3}


def test_fresh_parameters_are_drawn_even_if_in_the_source(sources):
    warm = take(
        wanted("a/first", "a/second", "a/new"),
        [Origin(sources / "one", "net/stage_1", "a")],
        fresh=(Allowance("a/(first|new)", "starts from scratch"),),
        leave=(Allowance("a/third", "has no place"), Allowance(".*", "never comes to this")),
    )
    assert values(warm) == {"a/second": 2}
    assert warm.account["fresh"] == [
        {"name": "a/first", "reason": "starts from scratch"},
        {"name": "a/new", "reason": "starts from scratch"},
    ]
    assert warm.account["left"] == [{"name": "a/third", "reason": "has no place"}]


def test_user_regex_without_a_match_causes_a_warning(sources, caplog):
    def taken(**allowed):
        take(
            wanted("a/first", "a/second"),
            [Origin(sources / "one", "net/stage_1", "a")],
            leave=(Allowance("a/third", "has no place"),),
            **allowed,
        )

    taken(fresh=(Allowance("a/fourth", "built in"), Allowance("a/first", "asked for", True)))
    assert not caplog.text
    taken(fresh=(Allowance("a/firs", "config.sources.fresh", True),))
    assert (
        "config.sources.fresh='a/firs' matches no parameter and changes nothing; the regex must "
        "match a whole path, such as a/first"
    ) in caplog.text


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ({"fresh": (Allowance("a/ne", ""), Allowance("new", ""))}, "a/new of shape .* is in none"),
        ({"leave": (Allowance("a/thir", ""), Allowance("third", ""))}, "a/third .* has no place"),
    ],
)
def test_allowances_match_whole_paths_only(sources, allowed, message):
    everything = {"fresh": (Allowance("a/new", "x"),), "leave": (Allowance("a/third", "x"),)}
    origins = [Origin(sources / "one", "net/stage_1", "a")]
    targets = wanted("a/first", "a/second", "a/new")
    take(targets, origins, **everything, read=False)
    with pytest.raises(ValueError, match=message):
        take(targets, origins, **everything | allowed)


def test_subtree_must_consist_of_whole_keys(sources):
    with pytest.raises(ValueError, match=r"holds no 'net/stag', only \['net'\]"):
        take(wanted("a/first"), [Origin(sources / "one", "net/stag", "a")])


def test_take_without_read_loads_nothing_but_reports_mismatches(sources):
    origins = [Origin(sources / "two", "net/stage_1", "a")]
    warm = take(wanted("a/first", "a/second"), origins, read=False)
    assert (warm.params, [entry["arrays"] for entry in _taken(warm)]) == ({}, [0])
    with pytest.raises(ValueError, match=r"a/first should be \(3, 2\) and is \(4, 2\)"):
        take(wanted("a/first", "a/second", shape=(3, 2)), origins, read=False)


def test_parameters_take_the_target_dtype_and_sharding(sources):
    sharding = NamedSharding(split_mesh(), P("fsdp"))
    targets = wanted("a/first", "a/second", dtype=jnp.bfloat16, sharding=sharding)
    warm = take(targets, [Origin(sources / "two", "net/stage_1", "a")])
    assert values(warm) == {"a/first": 4, "a/second": 5}
    for leaf in warm.params["a"].values():
        assert (leaf.dtype, leaf.sharding) == (jnp.bfloat16, sharding)


def test_first_fully_matching_adaptation_is_used(sources):
    """Its result is where it is wanted, with every part in its place."""
    sharding = NamedSharding(split_mesh(), P("fsdp", "expert"))
    targets = wanted("a/first", "a/second", shape=(6, 2), sharding=sharding)
    rows = lambda array, shape: np.arange(shape[0])[:, None] + array[:1]  # noqa: E731
    refuse = lambda array, shape: pytest.fail("is of another path")  # noqa: E731
    adapt = {"a/firs": refuse, "first": refuse, "a/(first|second)": rows, ".*": refuse}
    warm = take(targets, [Origin(sources / "two", "net/stage_1", "a")], adapt=adapt)
    for name, first in (("first", 4), ("second", 5)):
        leaf = warm.params["a"][name]
        np.testing.assert_array_equal(leaf, first + np.repeat(np.arange(6)[:, None], 2, axis=1))
        assert leaf.sharding == sharding
    assert warm.account["adapted"] == [
        {"name": "a/first", "from": [4, 2], "to": [6, 2]},
        {"name": "a/second", "from": [4, 2], "to": [6, 2]},
    ]
    assert [entry["arrays"] for entry in _taken(warm)] == [2]
