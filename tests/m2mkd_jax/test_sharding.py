"""Eight devices compute what one does, with everything large actually sharded."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from meshes import idle_rules, one_device, split_mesh
from tiny import OPTIM, tiny_config

from common_jax import checkpoint
from common_jax.config import freeze
from common_jax.mesh import AXES, MeshConfig, make_mesh, match_rules
from common_jax.metrics import read_metrics
from m2mkd_jax.config import Config
from m2mkd_jax.models import vit, vmoe
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.phases import end_to_end

LONG = dataclasses.replace(OPTIM, steps=12, accumulate=2)


def losses(workdir):
    return [
        line["train/loss"]
        for line in read_metrics(workdir / "metrics.jsonl")
        if "train/loss" in line
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on one device and on a 2 x 2 x 2 mesh, and the state's shardings on the
    latter."""
    config = tiny_config("end_to_end", optim=LONG, stages=2)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "eight")}
    states = []
    save = checkpoint.Checkpoints.save

    def spy(self, state, **arguments):
        states.append(jax.tree.map(lambda x: (x.shape, x.sharding), state))
        save(self, state, **arguments)

    end_to_end.run(config, folders["one"], one_device())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", spy)
        end_to_end.run(config, folders["eight"], split_mesh())
    return folders, states[-1]


def test_losses_agree_with_one_device(runs):
    folders, _ = runs
    one, eight = losses(folders["one"]), losses(folders["eight"])
    assert len(one) == 6
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_parameters_and_optimizer_state_are_sharded(runs):
    _, state = runs
    block = state.params["student"]["stage_1"]["block_0"]
    moments = state.opt_state[1].mu["student"]["stage_1"]["block_0"]
    for tree in (block, moments):
        assert split(tree["moe"]["up"]) == (2, 8, 32)  # of (4, 16, 32): experts and width in two
        assert split(tree["moe"]["down"]) == (2, 32, 8)
        assert split(tree["attention"]["qkv"]["kernel"]) == (8, 3, 2, 8)
        assert split(tree["norm1"]["scale"]) == (16,)


def test_all_parameters_and_moments_are_sharded_by_their_rules(runs):
    _, state = runs
    mesh, pairs = split_mesh(), {"is_leaf": lambda x: isinstance(x, tuple)}
    for tree in (state.params, state.opt_state[1].mu):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x[0], np.float32), tree, **pairs)
        rules = match_rules(vmoe.PARTITION_RULES, shapes, mesh)
        expected = jax.tree.map(lambda x, rule: rule.shard_shape(x.shape), shapes, rules)
        assert jax.tree.map(split, tree, **pairs) == expected


def test_activations_are_sharded():
    mesh, interface = split_mesh(), Interface(8, 1, 10)
    network = vmoe.build(tiny_config("end_to_end").model, interface, stitch_width=None)
    params = network.init(jax.random.key(0))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda params, x: network.apply(params, x, stop=1)[0])
        tokens = run(params, np.zeros((16, 8, 8, 1), np.float32))
    assert tokens.sharding.spec[0] == AXES
    assert tokens.sharding.shard_shape(tokens.shape) == (2, 5, 16)


@pytest.mark.parametrize("devices", [1, 4])
def test_checkpoint_of_eight_devices_loads_on_fewer(runs, devices):
    folders, _ = runs
    mesh = make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
    params = checkpoint.load(folders["eight"], mesh=mesh, rules=vmoe.PARTITION_RULES)
    whole = checkpoint.load(folders["eight"])
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    up = params["student"]["stage_0"]["block_0"]["moe"]["up"]
    assert up.sharding.shard_shape(up.shape) == (4, 16 // devices, 32)


def test_run_on_eight_devices_resumes_on_one(runs, tmp_path):
    folders, _ = runs
    shutil.copytree(folders["eight"], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    config = dataclasses.replace(
        freeze(Config, checkpoint.load_config(folders["eight"])), mesh=MeshConfig(data=1)
    )
    one = make_mesh(config.mesh, jax.devices()[:1])
    result = end_to_end.run(config, tmp_path / "run", one)
    expected = json.loads((folders["eight"] / "result.json").read_text())
    assert result["steps"] == expected["steps"] == 12
    assert result["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)


def test_no_partition_rule_is_idle():
    interface = Interface(8, 1, 10)
    config = tiny_config("end_to_end")
    dense = dataclasses.replace(config.model, moe_blocks="0")
    networks = {
        "vit": vit.build(config.teacher, interface, stitch_width=24),
        "vmoe": vmoe.build_students(dense, interface, meta_width=16),
    }
    shapes = {name: jax.eval_shape(net.init, jax.random.key(0)) for name, net in networks.items()}
    assert idle_rules(vit.PARTITION_RULES, shapes["vit"]) == []
    assert idle_rules(vmoe.PARTITION_RULES, shapes["vmoe"]) == []


def test_indivisible_width_is_named(tmp_path):
    config = tiny_config("end_to_end")
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    narrow = dataclasses.replace(config.model, width=12)
    with pytest.raises(ValueError, match=r"splits its axis of 12 over config\.mesh\.fsdp=8"):
        end_to_end.run(dataclasses.replace(config, model=narrow), tmp_path / "run", mesh)
    assert not (tmp_path / "run").exists()


def split(entry) -> tuple[int, ...]:
    shape, sharding = entry
    return sharding.shard_shape(shape)
