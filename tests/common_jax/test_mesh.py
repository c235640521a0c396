"""Meshes and partition rules: divisible sizes, and errors for others."""

import types

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from meshes import idle_rules, one_device

from common_jax import mesh as meshes
from common_jax.mesh import (
    MeshConfig,
    batch_shards,
    constrain,
    count_slices,
    make_mesh,
    match_rules,
    move_to_devices,
    put_rows,
    replicated,
    take_rows,
    to_devices,
    with_shardings,
)


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_free_axis_takes_the_remaining_devices():
    assert dict(make_mesh(MeshConfig(fsdp=2, expert=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "expert": 2,
    }


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), (2, 4, 1)),
        (MeshConfig(data=1, fsdp=2, expert=-1), (1, 2, 4)),
        (MeshConfig(4, 1, 2), (4, 1, 2)),
    ],
)
def test_devices_follow_the_order_of_the_axes(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "expert")
    numbers = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(numbers, np.arange(8).reshape(sizes))  # expert varies fastest


def test_only_tpus_have_slices():
    def device(platform, **attributes):
        return types.SimpleNamespace(platform=platform, **attributes)

    assert count_slices([device("tpu", slice_index=i // 2) for i in range(6)]) == 3
    assert count_slices([device("tpu"), device("tpu")]) == 1
    assert count_slices([device("gpu", slice_index=i) for i in range(2)]) == 1


def test_only_one_axis_may_be_free():
    with pytest.raises(ValueError, match=r"^fsdp=-1 and data=-1: only one axis"):
        MeshConfig(fsdp=-1)


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(2, 2, 4)])
def test_mesh_that_does_not_divide_is_reported_with_its_sizes(config):
    with pytest.raises(ValueError, match=r"config\.mesh=data .* fsdp .* expert"):
        make_mesh(config)


def test_rules_shard_matching_parameters():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    rules = ((r"/up$", P("expert", "fsdp")), (r"/bias$", P()))
    shardings = match_rules(rules, {"moe": {"up": leaf(4, 8, 3), "bias": leaf(3)}}, mesh)
    assert shardings["moe"]["up"].spec == P("expert", "fsdp")
    assert shardings["moe"]["bias"].spec == P()


def test_first_matching_rule_wins_and_unsharded_axes_need_not_divide():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    rules = ((r"^/up$", P("expert")), (r"/up", P(None, "fsdp")), (r"up$", P("fsdp")))
    params = {"up": leaf(4), "a": {"up": leaf(3, 8), "top_up": leaf(2, 3)}}
    found = jax.tree.map(lambda sharding: sharding.spec, match_rules(rules, params, mesh))
    assert found == {"up": P("expert"), "a": {"up": P(None, "fsdp"), "top_up": P("fsdp")}}
    assert idle_rules(rules, params) == []
    shapes = with_shardings(params, match_rules(rules, params, mesh))
    assert (shapes["a"]["up"].shape, shapes["a"]["up"].dtype) == ((3, 8), jnp.float32)
    assert shapes["a"]["up"].sharding.spec == P(None, "fsdp")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"down": leaf(4, 4)}, "no partition rule matches parameter 'down'"),
        ({"up": leaf(3, 8)}, r"'up' .* splits its axis of 3 over config\.mesh\.expert=2"),
        ({"up": leaf(4)}, "more axes than parameter 'up'"),
    ],
)
def test_rules_refuse_parameters_that_do_not_fit(params, message):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    with pytest.raises(ValueError, match=message):
        match_rules(((r"/up$", P("expert", "fsdp")),), params, mesh)


def test_array_axis_may_be_sharded_over_two_mesh_axes():
    mesh, spec = make_mesh(MeshConfig(fsdp=2, expert=2)), P(("fsdp", "expert"))
    placed = match_rules(((r"/up$", spec),), {"up": leaf(4)}, mesh)
    assert placed["up"].spec == spec
    said = r"axis of 6 over config\.mesh\.fsdp=2 x config\.mesh\.expert=2, which does not divide"
    with pytest.raises(ValueError, match=said):
        match_rules(((r"/up$", spec),), {"up": leaf(6)}, mesh)


def test_idle_rules_are_never_the_first_match():
    rules = ((r"/up$", P()), (r"/up", P()), (r"/gone$", P()))
    assert idle_rules(rules, {"up": leaf(1)}, {"a": {"up": leaf(1)}}) == [r"/up", r"/gone$"]


def test_constrained_activations_are_sharded():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: constrain(2 * x, "batch", "tokens", "width"))(jnp.ones((16, 3, 4)))
    assert x.sharding.shard_shape(x.shape) == (2, 3, 4)


def test_constrain_does_nothing_without_a_mesh():
    assert constrain(jnp.ones((3, 1, 1)), "batch", "tokens", "width").shape == (3, 1, 1)


def test_batch_is_sharded_over_all_axes():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    batch = to_devices({"label": jnp.arange(16)}, mesh)
    assert {shard.data.shape for shard in batch["label"].addressable_shards} == {(2,)}
    with pytest.raises(
        ValueError, match=r"config\.optim\.batch=12 must be a multiple of .* 8 devices"
    ):
        meshes.check_batch(mesh, "config.optim.batch", 12)
    np.testing.assert_array_equal(batch["label"], np.arange(16))
    for size in (8, 16):
        meshes.check_batch(mesh, "config.optim.batch", size)


def test_batch_has_one_shard_per_device():
    assert batch_shards() == 1
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, expert=2))):
        assert jax.jit(batch_shards)() == 8


def test_rows_are_taken_from_every_shard_and_put_back():
    tree = {"x": jnp.arange(16).reshape(8, 2), "y": 10 * jnp.arange(8), "rate": jnp.array(0.5)}
    rows = jnp.array([[2, 0], [3, 1]])  # for two shards out of four
    taken = take_rows(tree, rows)
    np.testing.assert_array_equal(taken["y"], [20, 0, 70, 50])
    np.testing.assert_array_equal(taken["x"], [[4, 5], [0, 1], [14, 15], [10, 11]])
    assert taken["rate"] == 0.5
    new = {"x": -taken["x"], "y": jnp.array([1, 2, 3, 4])}
    put = put_rows({"x": tree["x"], "y": tree["y"]}, new, rows)
    np.testing.assert_array_equal(put["y"], [2, 10, 1, 30, 40, 4, 60, 3])
    sign = np.array([-1, 1, -1, 1, 1, -1, 1, -1])
    np.testing.assert_array_equal(put["x"], sign[:, None] * np.asarray(tree["x"]))


def test_activations_are_sharded_by_example_only():
    lookups = {"looked_up", "columns"}
    assert set(meshes.ACTIVATIONS) == {"batch", "tokens", "width", "labels", *lookups}
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, expert=2))):
        for name in ("tokens", "width", "labels"):
            x = jax.jit(lambda x, name=name: constrain(2 * x, "batch", name))(jnp.ones((16, 8)))
            assert x.sharding.shard_shape(x.shape) == (2, 8)


def test_table_lookups_stay_sharded_by_column():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, expert=2))):
        x = jax.jit(lambda x: constrain(2 * x, "looked_up", "columns"))(jnp.ones((16, 8)))
        assert x.sharding.shard_shape(x.shape) == (4, 4)


def test_role_without_parameters_stays_in_the_tree():
    shapes = {"meta": {}, "module": {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    shardings = match_rules([("w$", P())], shapes, one_device())
    assert shardings["meta"] == {}
    placed = meshes.with_shardings(shapes, shardings)
    assert placed["meta"] == {} and placed["module"]["w"].shape == (4,)


def test_move_to_devices_replaces_numpy_arrays():
    tree = {"a": np.ones(2), "b": {"c": np.zeros((2, 3), np.float32)}}
    before = jax.tree.map(np.array, tree)
    move_to_devices(tree, replicated(one_device()))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))
    jax.tree.map(np.testing.assert_array_equal, tree, before)
    there = tree["b"]["c"]
    move_to_devices(tree, replicated(one_device()))
    assert tree["b"]["c"] is there
