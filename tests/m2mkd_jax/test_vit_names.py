"""Names of ViT and V-MoE tensors: exact in both directions, and clear errors for what does not
fit."""

import re

import jax
import numpy as np
import pytest
from same import assert_same
from tiny import random_like

from common_jax.weights import table as tables
from m2mkd_jax.families.vmoe import sizes
from m2mkd_jax.models import encoder, vit, vit_names, vmoe
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.stages import Place, locate

DEPTHS, HEADS, EXPERTS = (2, 1, 2), 2, 3
IMAGES = encoder.Interface(image_size=8, channels=3, labels=5)
SIZES = {"patch": 4, "width": 6, "heads": HEADS, "mlp_ratio": 2.0, "depths": DEPTHS}
WHOLE = vit_names.network_table(DEPTHS, heads=HEADS)
WHOLE_VMOE = vit_names.network_table(DEPTHS, heads=HEADS, experts=EXPERTS)
MIDDLE = vit_names.stage_table(1, Place.MIDDLE, heads=HEADS, experts=EXPERTS)


def read(table, state, params):
    """Parameters in the shapes of `params`."""
    return tables.read(table, state, shapes=params, file="a.pth")[0]


def random_params(network):
    return random_like(jax.eval_shape(network.init, jax.random.key(0)))


@pytest.fixture(scope="module")
def vit_params():
    return random_params(vit.build(vit.ViTConfig(**SIZES), IMAGES))


@pytest.fixture(scope="module")
def vmoe_params():
    config = vmoe.VMoEConfig(moe=MoeConfig(experts=3), moe_blocks="1,2,4", **SIZES)
    return random_params(vmoe.build_students(config, IMAGES, meta_width=10))


@pytest.mark.parametrize(("params", "table"), [("vit_params", WHOLE), ("vmoe_params", WHOLE_VMOE)])
def test_round_trips_are_the_identity(params, table, request):
    params = request.getfixturevalue(params)
    assert_same(read(table, tables.write(table, params), params), params)
    for i, stage in enumerate(params.values()):
        experts = EXPERTS if table is WHOLE_VMOE else 0
        place = Place.of(i, len(DEPTHS))
        own = vit_names.stage_table(DEPTHS[i], place, heads=HEADS, experts=experts)
        assert_same(read(own, tables.write(own, stage), stage), stage)


def test_gate_of_soft_moe_round_trips_and_reveals_its_fields():
    moe = MoeConfig(experts=3, router="soft", slots_per_expert=2)
    params = random_params(vmoe.build(vmoe.VMoEConfig(moe=moe, **SIZES), IMAGES, stitch_width=None))
    state = tables.write(WHOLE_VMOE, params)
    assert state["blocks.4.moe.gate.phi"].shape == (6, 3, 2)
    assert_same(read(WHOLE_VMOE, state, params), params)
    fields = {name: x for name, x in sizes(state).items() if name.startswith("moe.")}
    assert fields == {"moe.router": "soft", "moe.experts": 3, "moe.slots_per_expert": 2}


def test_names_and_shapes_match_original(vmoe_params):
    state = tables.write(WHOLE_VMOE, vmoe_params)
    shapes = {name: array.shape for name, array in state.items()}
    assert shapes["patch_embed.proj.weight"] == (6, 3, 4, 4)
    assert shapes["blocks.0.mlp.fc1.weight"] == (12, 6)
    assert shapes["blocks.3.attn.qkv.weight"] == (18, 6)
    assert shapes["blocks.4.moe.experts.2.htoh4.weight"] == (1, 12, 6)
    assert shapes["blocks.4.moe.experts.2.h4toh.bias"] == (1, 6)
    assert shapes["blocks.4.moe.gate.gate.weight"] == (3, 6)
    assert shapes["blocks.1.post_stitch.fc.weight"] == (10, 6)
    assert shapes["blocks.2.pre_stitch.ln.weight"] == (10,)
    local = list(tables.write(MIDDLE, vmoe_params["stage_1"]))
    assert local[0] == "blocks.0.pre_stitch.ln.weight"
    assert local[-1] == "blocks.0.post_stitch.fc.bias"


def test_converted_layouts_give_the_same_products(vit_params):
    state = tables.write(WHOLE, vit_params)
    rng = np.random.default_rng(1)
    x, square = rng.standard_normal(6), rng.standard_normal((4, 4, 3))
    attention = vit_params["stage_0"]["block_1"]["attention"]
    rows = (state["blocks.1.attn.qkv.weight"] @ x).reshape(3, HEADS, 3)
    np.testing.assert_allclose(np.einsum("D,DQHK->QHK", x, attention["qkv"]["kernel"]), rows)
    out = state["blocks.1.attn.proj.weight"] @ x
    kernel = attention["out"]["kernel"]
    np.testing.assert_allclose(np.einsum("HK,HKD->D", x.reshape(HEADS, 3), kernel), out)
    convolved = np.einsum("IJC,DCIJ->D", square, state["patch_embed.proj.weight"])
    kernel = vit_params["stage_0"]["patches"]["kernel"]
    np.testing.assert_allclose(square.ravel() @ kernel, convolved)


def fuse(state):
    """The middle student's state with one tensor for all experts."""
    fused = {name: array for name, array in state.items() if ".experts." not in name}
    for tensor in ("htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias"):
        each = [state[f"blocks.0.moe.experts.{e}.{tensor}"] for e in range(EXPERTS)]
        fused[f"blocks.0.moe.experts.{tensor}"] = np.concatenate(each)
    return fused


def test_fused_experts_are_read(vmoe_params):
    stage = vmoe_params["stage_1"]
    fused = fuse(tables.write(MIDDLE, stage))
    found, account = tables.read(MIDDLE, fused, shapes=stage, file="a.pth")
    assert_same(found, stage)
    assert ("blocks.0.moe.experts.htoh4.weight", "block_0/moe/up", (3, 12, 6)) in account.taken
    listed = {f"stages.0.{name}": array for name, array in fused.items()}
    assert_same(read(MIDDLE, listed, stage), stage)


@pytest.fixture(scope="module")
def many_experts():
    """A block with eleven experts, whose numbers sort differently as text."""
    config = vmoe.VMoEConfig(**SIZES | {"depths": (1,)}, moe=MoeConfig(experts=11))
    return random_params(vmoe.build(config, IMAGES, stitch_width=None))["stage_0"]


ELEVEN = vit_names.stage_table(1, Place.ONLY, heads=HEADS, experts=11)


def test_the_order_of_tensors_does_not_matter(many_experts):
    state = tables.write(ELEVEN, many_experts)
    for names in (sorted(state), sorted(state, reverse=True)):
        shuffled = {name: state[name] for name in names}
        assert_same(read(ELEVEN, shuffled, many_experts), many_experts)


def test_every_tensor_is_found_under_its_name(many_experts):
    state, block = tables.write(ELEVEN, many_experts), many_experts["block_0"]
    same = {
        "pos_embed": many_experts["pos_embed"],
        "cls_token": many_experts["cls_token"],
        "patch_embed.proj.bias": many_experts["patches"]["bias"],
        "norm.weight": many_experts["norm"]["scale"],
        "norm.bias": many_experts["norm"]["bias"],
        "head.weight": many_experts["head"]["kernel"].T,
        "head.bias": many_experts["head"]["bias"],
        "blocks.0.norm1.weight": block["norm1"]["scale"],
        "blocks.0.norm1.bias": block["norm1"]["bias"],
        "blocks.0.norm2.weight": block["norm2"]["scale"],
        "blocks.0.norm2.bias": block["norm2"]["bias"],
        "blocks.0.attn.qkv.bias": block["attention"]["qkv"]["bias"].ravel(),
        "blocks.0.attn.proj.bias": block["attention"]["out"]["bias"],
        "blocks.0.moe.gate.gate.weight": block["moe"]["router"]["kernel"].T,
        "blocks.0.moe.gate.gate.bias": block["moe"]["router"]["bias"],
    }
    for e in (0, 2, 10):
        expert = f"blocks.0.moe.experts.{e}"
        same[f"{expert}.htoh4.weight"] = block["moe"]["up"][e].T[None]
        same[f"{expert}.htoh4.bias"] = block["moe"]["up_bias"][e][None]
        same[f"{expert}.h4toh.weight"] = block["moe"]["down"][e].T[None]
        same[f"{expert}.h4toh.bias"] = block["moe"]["down_bias"][e][None]
    assert_same({name: state[name] for name in same}, same)


@pytest.mark.parametrize(
    ("block", "stage", "within"), [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 2, 0), (4, 2, 1)]
)
def test_blocks_are_numbered_across_stages(block, stage, within):
    assert locate(block, DEPTHS) == (stage, within)
    listed = f"stages.{stage}.blocks.{within}.norm1.bias"
    assert WHOLE.aliases[listed] == f"blocks.{block}.norm1.bias"
    assert WHOLE.aliases["stages.2.head.bias"] == "head.bias"
    with pytest.raises(IndexError, match=r"depths=\(2, 1, 2\) have only 5 blocks"):
        locate(5, DEPTHS)


def test_tensors_listed_by_stage_must_agree(vit_params):
    state = tables.write(WHOLE, vit_params)
    listed = {alias: state[name] for alias, name in WHOLE.aliases.items() if name in state}
    assert_same(read(WHOLE, state | listed, vit_params), vit_params)
    assert_same(read(WHOLE, listed, vit_params), vit_params)
    other = listed | {"stages.1.blocks.0.norm1.bias": np.zeros(6)}
    with pytest.raises(ValueError, match=r"bias should equal blocks\.2\.norm1\.bias and does not"):
        read(WHOLE, state | other, vit_params)


def test_partial_network_is_written_under_root_names(vit_params):
    part = {"stage_1": {"block_0": {"norm1": vit_params["stage_1"]["block_0"]["norm1"]}}}
    assert list(tables.write(WHOLE, part)) == ["blocks.2.norm1.weight", "blocks.2.norm1.bias"]


def test_patch_kernel_with_other_channels():
    kernel = {"patches": {"kernel": np.arange(32.0).reshape(16, 2)}}
    grey = vit_names.stage_table(1, Place.FIRST, heads=1, channels=1)
    state = tables.write(grey, kernel)
    assert state["patch_embed.proj.weight"].shape == (2, 1, 4, 4)
    colour = vit_names.stage_table(1, Place.FIRST, heads=1)
    with pytest.raises(ValueError, match="channels=3"):
        tables.write(colour, kernel)
    whole = vit_names.network_table((1,), heads=1, channels=1)
    assert_same(tables.write(whole, {"stage_0": kernel}), state)


def drop(name):
    return lambda state: state.pop(name)


def add(name):
    return lambda state: state.update({name: np.zeros((1, 1))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("blocks.0.attn.qkv.weight"), r"attn\.qkv\.weight \(18, 6\) is missing, for block_0"),
        (drop("blocks.0.norm1.bias"), r"blocks\.0\.norm1\.bias \(6,\) is missing"),
        (drop("blocks.0.moe.gate.gate.weight"), r"gate\.gate\.weight \(3, 6\) is missing"),
        (drop("blocks.0.post_stitch.ln.bias"), r"post_stitch\.ln\.bias \(6,\) is missing"),
        (drop("blocks.0.moe.experts.1.htoh4.bias"), r"experts\.1\.htoh4\.bias \(1, 12\) is miss"),
        (
            add("blocks.0.moe.experts.htoh4.bias"),
            r"htoh4\.bias \(1, 1\) and .*htoh4\.bias are the same",
        ),
        (add("blocks.0.mlp.fc1.weight"), r"mlp\.fc1\.weight \(1, 1\) has no place"),
        (add("blocks.2.norm1.weight"), r"blocks\.2\.norm1\.weight \(1, 1\) has no place"),
        (add("head.weight"), r"head\.weight \(1, 1\) has no place"),
        (add("blocks.0.attn.relative"), r"blocks\.0\.attn\.relative \(1, 1\) has no place"),
        (add("dist_token"), r"dist_token \(1, 1\) has no place"),
    ],
)
def test_mismatched_state_is_refused(change, message, vmoe_params):
    state = tables.write(MIDDLE, vmoe_params["stage_1"])
    change(state)
    with pytest.raises(ValueError, match=message):
        read(MIDDLE, state, vmoe_params["stage_1"])


def test_mismatched_network_is_refused(vit_params):
    state = tables.write(WHOLE, vit_params)
    shorter = vit_names.network_table((2, 1, 1), heads=HEADS)
    params = vit_params | {"stage_2": dict(vit_params["stage_2"])}
    del params["stage_2"]["block_1"]
    with pytest.raises(ValueError, match=r"blocks\.4\.attn\.proj\.bias \(6,\) has no place"):
        read(shorter, state, params)
    headless = {name: array for name, array in state.items() if name != "head.bias"}
    with pytest.raises(ValueError, match=r"head\.bias \(5,\) is missing, for stage_2/head/bias"):
        read(WHOLE, headless, vit_params)


def test_parameters_that_have_no_published_name_are_refused(vit_params):
    with pytest.raises(ValueError, match=r"no published names for \['block_0/gain'\]"):
        tables.write(MIDDLE, {"block_0": {"gain": np.ones(1)}})
    with pytest.raises(ValueError, match="stage_3"):
        tables.write(WHOLE, {"stage_3": {"cls_token": np.ones(1)}})


def test_misfits_lists_missing_and_unknown_tensors(vit_params, vmoe_params):
    plain = vit_names.network_table((1,), heads=1)
    routed = vit_names.network_table((1,), heads=1, experts=1)
    dense, mixed = tables.write(WHOLE, vit_params), tables.write(WHOLE_VMOE, vmoe_params)
    assert tables.misfits(plain, dense) == tables.misfits(routed, mixed) == []
    assert tables.misfits(routed, fuse_all(mixed)) == []
    assert tables.misfits(MIDDLE, dense) == [
        f"{name} has no place" for name in sorted(dense) if not name.startswith("blocks.")
    ]
    del dense["blocks.0.norm1.bias"]
    assert tables.misfits(plain, dense) == []  # it is in other blocks
    del dense["head.bias"]  # a file may have no head
    assert tables.misfits(plain, dense) == []
    del dense["norm.bias"]
    assert tables.misfits(plain, dense | {"fc_norm.weight": None}) == [
        "norm.bias is missing",
        "fc_norm.weight has no place",
    ]


def fuse_all(state):
    """Only the names of the state with fused experts."""
    return {re.sub(r"experts\.\d+\.", "experts.", name) for name in state}
