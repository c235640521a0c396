"""A V-MoE initialised from a dense ViT: it computes the same, and what was taken is recorded."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util
from meshes import one_device
from tiny import NAC, SIZES, fill, tiny_config

from common_jax import checkpoint
from common_jax.config import unfreeze
from common_jax.state import merge
from m2mkd_jax.config import InitConfig, SourcesConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.moe.layer import MoeMlp
from m2mkd_jax.phases.end_to_end import run, upcycle
from m2mkd_jax.phases.fields import check_sources
from m2mkd_jax.phases.networks import parameter_shapes, teacher_network, whole_student

EXPERTS = 3
ONE = one_device()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A workdir with a ViT whose stages have 2, 1 and 1 blocks, and its parameters."""
    config, workdir = tiny_config("assemble"), tmp_path_factory.mktemp("dense")
    params = {"teacher": fill(teacher_network(config).init)}
    checkpoint.write_params(workdir, params, unfreeze(config).to_dict())
    return str(workdir), params["teacher"]


def config_of(source, *, depths=(1, 1, 2), **moe):
    """A V-MoE with as many blocks in other stages, and experts in blocks 1 and 3."""
    moe = {"experts": EXPERTS, "chosen": 2} | moe
    sizes = SIZES | {"depths": depths, "moe_blocks": "1,3" if sum(depths) > 3 else "1"}
    return dataclasses.replace(
        tiny_config("end_to_end"),
        model=VMoEConfig(moe=MoeConfig(**moe), **sizes),
        init=InitConfig(upcycle=source),
    )


def start(config):
    network = whole_student(config)
    return network, upcycle(config, parameter_shapes(config, network, "student", ONE))


def test_upcycled_vmoe_matches_the_vit(dense):
    source, params = dense
    config = config_of(source)
    network, found = start(config)
    student = merge(fill(network.init), found.params["student"])
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype(np.float32)
    teacher = teacher_network(config)

    def both(params, student, images):
        return teacher.apply(params, images)[0], network.apply(student, images)[0]

    want, got = jax.jit(both)(params, student, images)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("moe", "sums_to_one"),
    [
        ({}, True),
        ({"dispatch": "capacity", "capacity_factor": 1.5}, True),
        ({"router": "softmax_topk", "chosen": EXPERTS}, True),
        ({"router": "softmax_topk", "chosen": 1}, False),
    ],
)
def test_upcycled_layer_is_the_mlp_times_its_gates(dense, moe, sums_to_one):
    """y = sum(gates) MLP(x), which holds for any router that drops no token."""
    source, params = dense
    config = config_of(source, **moe)
    network, found = start(config)
    experts = merge(fill(network.init), found.params["student"])["stage_1"]["block_0"]["moe"]
    mlp = params["stage_0"]["block_1"]["mlp"]
    x = np.random.default_rng(2).normal(size=(2, 5, 16)).astype(np.float32)
    layer = MoeMlp(config.model.moe, 32)
    with jax.set_mesh(ONE):
        y, recorded = jax.jit(lambda p, x: layer.apply({"params": p}, x, mutable=["routing"]))(
            experts, x
        )
    hidden = jax.nn.gelu(x @ mlp["up"]["kernel"] + mlp["up"]["bias"], approximate=False)
    want = hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    gates = np.sum(recorded["routing"]["weight"], axis=-1, keepdims=True)
    np.testing.assert_allclose(y, gates * want, rtol=1e-5, atol=1e-6)
    assert np.allclose(gates, 1, rtol=1e-6) == sums_to_one


def test_every_expert_copies_the_mlp_and_the_account_says_so(dense):
    source, params = dense
    _, found = start(config_of(source))
    flat = traverse_util.flatten_dict(found.params["student"], sep="/")
    mlp = params["stage_2"]["block_0"]["mlp"]
    for e in range(EXPERTS):
        np.testing.assert_array_equal(flat["stage_2/block_1/moe/up"][e], mlp["up"]["kernel"])
        np.testing.assert_array_equal(flat["stage_2/block_1/moe/down_bias"][e], mlp["down"]["bias"])
    fresh = {entry["name"] for entry in found.account["fresh"]}
    assert fresh == {
        f"student/{block}/moe/router/{leaf}"
        for block in ("stage_1/block_0", "stage_2/block_1")
        for leaf in ("kernel", "bias")
    }
    adapted = {entry["name"]: (entry["from"], entry["to"]) for entry in found.account["adapted"]}
    assert adapted["student/stage_1/block_0/moe/up"] == ([16, 32], [EXPERTS, 16, 32])
    assert len(adapted) == 8
    (taken,) = found.account["taken"]
    assert taken["arrays"] == len(jax.tree.leaves(params)) == len(flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 1, 1)}, r"\(2, 1, 1\) blocks, 4 in all, but config.model.depths=\(1, 1, 1"),
        (
            {"mlp_ratio": 4.0},
            r"(?s)mlp/up/bias should be \(64,\).*moe/up should be \(3, 16, 64\) and is \(16",
        ),
        ({"qkv_bias": False}, r"stage_0/block_0/attention/qkv/bias of shape .* has no place"),
    ],
)
def test_mismatched_vit_is_refused_before_compiling(dense, tmp_path, change, message):
    config = config_of(dense[0])
    model = dataclasses.replace(config.model, moe_blocks="1", **change)
    config = dataclasses.replace(config, model=model)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "run", ONE)
    assert not (tmp_path / "run").exists()


def test_upcycling_from_a_non_vit_is_refused(tmp_path):
    config = tiny_config("end_to_end")
    checkpoint.write_params(tmp_path, {"student": {"a": np.ones(2)}}, unfreeze(config).to_dict())
    with pytest.raises(ValueError, match=r"holds \['student'\], but must hold a dense ViT"):
        start(config_of(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "assemble"}, "is for phase='end_to_end', not phase='assemble'"),
        ({"phase": "pipeline"}, "is for phase='end_to_end', not phase='pipeline'"),
        ({"sources": SourcesConfig(students=("a",))}, "starts from only one of them"),
        ({"model": NAC}, r"of kind \['vmoe'\] from a ViT, but model.kind='nac'"),
    ],
)
def test_upcycling_in_other_phases_or_networks_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_sources(
            dataclasses.replace(tiny_config("end_to_end"), init=InitConfig(upcycle="x"), **changes)
        )
