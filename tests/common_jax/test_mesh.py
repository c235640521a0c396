"""Meshes and partition rules: what divides, what does not, and what is said then."""

import jax
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from common_jax import mesh as meshes
from common_jax.mesh import MeshConfig, constrain, idle_rules, make_mesh, match_rules, to_devices


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_the_free_axis_takes_what_the_others_leave():
    assert dict(make_mesh(MeshConfig(fsdp=2, expert=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "expert": 2,
    }


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(2, 2, 4)])
def test_a_mesh_that_does_not_divide_names_the_numbers(config):
    with pytest.raises(ValueError, match=r"config\.mesh=data .* fsdp .* expert"):
        make_mesh(config)


def test_rules_split_what_they_match():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    rules = ((r"/up$", P("expert", "fsdp")), (r"/bias$", P()))
    shardings = match_rules(rules, {"moe": {"up": leaf(4, 8, 3), "bias": leaf(3)}}, mesh)
    assert shardings["moe"]["up"].spec == P("expert", "fsdp")
    assert shardings["moe"]["bias"].spec == P()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"down": leaf(4, 4)}, "no partition rule matches parameter 'down'"),
        ({"up": leaf(3, 8)}, r"'up' .* splits its axis of 3 over config\.mesh\.expert=2"),
        ({"up": leaf(4)}, "more axes than parameter 'up'"),
    ],
)
def test_rules_refuse_what_does_not_fit(params, message):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    with pytest.raises(ValueError, match=message):
        match_rules(((r"/up$", P("expert", "fsdp")),), params, mesh)


def test_idle_rules_are_those_that_come_first_nowhere():
    rules = ((r"/up$", P()), (r"/up", P()), (r"/gone$", P()))
    assert idle_rules(rules, {"up": leaf(1)}, {"a": {"up": leaf(1)}}) == [r"/up", r"/gone$"]


def test_constrained_activations_come_out_sharded():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: constrain(2 * x, "batch", "tokens", "width"))(jnp.ones((16, 3, 4)))
    assert x.sharding.shard_shape(x.shape) == (2, 3, 4)


def test_constrain_does_nothing_without_a_mesh():
    assert constrain(jnp.ones((3, 1, 1)), "batch", "tokens", "width").shape == (3, 1, 1)


def test_a_batch_is_split_over_all_axes():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    batch = to_devices({"label": jnp.arange(16)}, mesh)
    assert {shard.data.shape for shard in batch["label"].addressable_shards} == {(2,)}
    with pytest.raises(
        ValueError, match=r"config\.optim\.batch=12 must be a multiple of .* 8 devices"
    ):
        meshes.check_batch(mesh, "config.optim.batch", 12)
