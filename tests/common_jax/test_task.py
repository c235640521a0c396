"""A task's state, initialised and sharded, and the shapes of its step."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from meshes import one_device, split_mesh

from common_jax.commands.plan.steps import step_arguments
from common_jax.optim import OptimConfig
from common_jax.state import fold_name
from common_jax.step import Programs
from common_jax.task import Task, abstract_state, average_program, create_program, step_program

OPTIM = OptimConfig(steps=4, batch=16, accumulate=2, lr=0.1, lr_per=None, schedule="constant")


def init(key):
    return {
        "body": {"kernel": jax.random.normal(fold_name(key, "body"), (8, 4))},
        "head": {"kernel": jax.random.normal(fold_name(key, "head"), (4, 2))},
    }


def loss(params, helpers, batch, rngs, step):
    value = jnp.mean(batch["x"] @ params["body"]["kernel"] @ params["head"]["kernel"])
    return value, {"load": jnp.ones(3)}


@pytest.fixture
def task():
    return Task(
        phase="test",
        init=init,
        rules=(("/body/kernel", P("fsdp")), ("/head/kernel", P(None, "expert"))),
        trainable="body/.*",
        loss=loss,
        batch={"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
        steps_per_epoch=2,
    )


def test_moments_and_averages_are_sharded_like_their_parameters(task):
    optim = dataclasses.replace(OPTIM, ema=0.9)
    abstract = abstract_state(task, optim, split_mesh())
    found = {
        jax.tree_util.keystr(path): (leaf.shape, leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
    }
    assert {spec for path, (_, spec) in found.items() if "kernel" not in path} == {P()}
    split = [entry for path, entry in found.items() if "'body'" in path]
    assert split == [((8, 4), P("fsdp"))] * 4  # the parameter, two moments and the average
    assert [entry for path, entry in found.items() if "'head'" in path] == [
        ((4, 2), P(None, "expert"))
    ]
    assert abstract.sums["load"].shape == (3,)
    assert abstract_state(task, OPTIM, split_mesh()).ema is None
    assert abstract_state(task, OPTIM, split_mesh(), averaged=True).ema == abstract.ema


def test_part_norms_are_among_the_sums(task):
    deep = dataclasses.replace(task, trainable=".*", clip_depth=1)
    sums = abstract_state(deep, OPTIM, one_device()).sums
    assert {name for name in sums if name.endswith("gradient_norm")} == {
        "gradient_norm",
        "body/gradient_norm",
        "head/gradient_norm",
    }


@pytest.mark.parametrize("make_mesh", [one_device, split_mesh])
def test_initial_state_is_drawn_from_the_seed_and_the_name_init(task, make_mesh):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        abstract = abstract_state(task, OPTIM, mesh)
        state = create_program(task, OPTIM, abstract)(np.uint32(3), {})
    wanted = init(jax.random.fold_in(jax.random.key(np.uint32(3)), 0xC674E474))
    for name, part in wanted.items():
        np.testing.assert_allclose(state.params[name]["kernel"], part["kernel"], rtol=1e-6)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)
    assert int(state.step) == 0


def test_warm_started_parameters_are_not_drawn(task):
    mesh = one_device()
    optim = dataclasses.replace(OPTIM, ema=0.9)
    with jax.set_mesh(mesh):
        abstract = abstract_state(task, optim, mesh)
        warm = {"body": {"kernel": jnp.full((8, 4), 7.0)}}
        state = create_program(task, optim, abstract)(np.uint32(2**32 - 1), warm)
    np.testing.assert_array_equal(state.params["body"]["kernel"], 7)
    np.testing.assert_array_equal(state.ema["body"]["kernel"], 7)  # the average starts there too
    assert float(jnp.std(state.params["head"]["kernel"])) > 0.1


def test_checkpoint_average_is_the_mean_and_sharded_like_the_parameters(task):
    mesh, values = split_mesh(), (1.0, 4.0, 7.0)
    with jax.set_mesh(mesh):
        abstract = abstract_state(task, OPTIM, mesh, averaged=True)
        include = average_program(task, abstract)
        state = create_program(task, OPTIM, abstract)(np.uint32(0), {})
        for count, value in enumerate(values, start=1):
            params = jax.tree.map(lambda x, value=value: jnp.full_like(x, value), state.params)
            params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, abstract.params))
            state = include(state.replace(params=params), np.float32(1 / count))
    assert list(state.ema) == ["body"]  # the head is not trained
    np.testing.assert_allclose(state.ema["body"]["kernel"], 4, rtol=1e-6)
    np.testing.assert_array_equal(state.params["body"]["kernel"], 7)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)


def test_step_arguments_hold_the_whole_batch(task):
    mesh = split_mesh()
    abstract = abstract_state(task, OPTIM, mesh)
    state, helpers, batch, seed = step_arguments(task, OPTIM, abstract, mesh)
    assert state is abstract and helpers is task.helpers
    assert batch["x"].shape == (16, 8) and batch["x"].sharding.shard_shape((16, 8)) == (2, 8)
    assert (seed.shape, seed.dtype) == ((), np.uint32)


def test_first_program_kept_under_a_name_is_reused():
    programs, first = Programs(), lambda: 1
    assert programs.keep("step", first) is first
    assert programs.keep("step", lambda: 2) is first
    assert programs.keep("create", len) is len
    assert Programs().keep("step", len) is len


def test_loss_receives_a_key_for_each_of_its_streams(task):
    given = []

    def listening(params, helpers, batch, rngs, step):
        given.append(tuple(rngs))
        return loss(params, helpers, batch, rngs, step)

    mesh = one_device()
    for streams in ((), ("a", "b")):
        given.clear()
        drawing = dataclasses.replace(task, loss=listening, streams=streams)
        abstract = abstract_state(drawing, OPTIM, mesh)
        with jax.set_mesh(mesh):
            step_program(drawing, OPTIM, abstract, log_every=1).lower(
                *step_arguments(drawing, OPTIM, abstract, mesh)
            )
        assert set(given) == {streams}
