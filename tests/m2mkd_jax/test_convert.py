"""The converter: exact in both directions, and clear about what does not fit."""

import jax
import numpy as np
import pytest
from same import assert_same
from tiny import random_like

from m2mkd_jax import convert
from m2mkd_jax.models import encoder, vit, vmoe
from m2mkd_jax.moe.layer import MoeConfig

DEPTHS, HEADS = (2, 1, 2), 2
IMAGES = encoder.Interface(image_size=8, channels=3, labels=5)
SIZES = {"patch": 4, "width": 6, "heads": HEADS, "mlp_ratio": 2.0, "depths": DEPTHS}


def random_params(network):
    return random_like(jax.eval_shape(network.init, jax.random.key(0)))


@pytest.fixture(scope="module")
def vit_params():
    return random_params(vit.build(vit.ViTConfig(**SIZES), IMAGES))


@pytest.fixture(scope="module")
def vmoe_params():
    config = vmoe.VMoEConfig(moe=MoeConfig(experts=3), moe_blocks="1,2,4", **SIZES)
    return random_params(vmoe.build_students(config, IMAGES, meta_width=10))


@pytest.mark.parametrize("params", ["vit_params", "vmoe_params"])
def test_round_trips_are_the_identity(params, request):
    params = request.getfixturevalue(params)
    state = convert.network_to_original(params, depths=DEPTHS)
    assert_same(convert.network_from_original(state, depths=DEPTHS, heads=HEADS), params)
    for stage in params.values():
        local = convert.stage_to_original(stage)
        assert_same(convert.stage_from_original(local, heads=HEADS), stage)


def test_names_and_shapes_are_the_original_s(vmoe_params):
    state = convert.network_to_original(vmoe_params, depths=DEPTHS)
    shapes = {name: array.shape for name, array in state.items()}
    assert shapes["patch_embed.proj.weight"] == (6, 3, 4, 4)
    assert shapes["blocks.0.mlp.fc1.weight"] == (12, 6)
    assert shapes["blocks.3.attn.qkv.weight"] == (18, 6)
    assert shapes["blocks.4.moe.experts.2.htoh4.weight"] == (1, 12, 6)
    assert shapes["blocks.4.moe.experts.2.h4toh.bias"] == (1, 6)
    assert shapes["blocks.4.moe.gate.gate.weight"] == (3, 6)
    assert shapes["blocks.1.post_stitch.fc.weight"] == (10, 6)
    assert shapes["blocks.2.pre_stitch.ln.weight"] == (10,)
    local = list(convert.stage_to_original(vmoe_params["stage_1"]))
    experts = [f"blocks.0.moe.experts.{e}.{t}" for e in range(3) for t in ("htoh4", "h4toh")]
    experts = [f"{name}.{kind}" for name in experts for kind in ("weight", "bias")]
    assert [name for name in local if ".experts." in name] == experts
    assert local[0] == "blocks.0.pre_stitch.ln.weight"
    assert local[-1] == "blocks.0.post_stitch.fc.bias"


def test_layouts_mean_the_same_products(vit_params):
    state = convert.network_to_original(vit_params, depths=DEPTHS)
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


def test_fused_experts_are_read_as_well(vmoe_params):
    stage = vmoe_params["stage_1"]
    state = convert.stage_to_original(stage)
    fused = {name: array for name, array in state.items() if ".experts." not in name}
    for tensor in ("htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias"):
        each = [state[f"blocks.0.moe.experts.{e}.{tensor}"] for e in range(3)]
        fused[f"blocks.0.moe.experts.{tensor}"] = np.concatenate(each)
    assert_same(convert.stage_from_original(fused, heads=HEADS), stage)


@pytest.fixture(scope="module")
def many_experts():
    """A block of eleven experts, whose numbers sort otherwise as text."""
    config = vmoe.VMoEConfig(**SIZES | {"depths": (1,)}, moe=MoeConfig(experts=11))
    return random_params(vmoe.build(config, IMAGES, stitch_width=None))["stage_0"]


def test_the_order_of_tensors_does_not_matter(many_experts):
    state = convert.stage_to_original(many_experts)
    for names in (sorted(state), sorted(state, reverse=True)):
        shuffled = {name: state[name] for name in names}
        assert_same(convert.stage_from_original(shuffled, heads=HEADS), many_experts)


def test_every_tensor_is_found_under_its_name(many_experts):
    state, block = convert.stage_to_original(many_experts), many_experts["block_0"]
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


def test_fused_experts_are_parted_and_their_origin_is_known():
    fused = np.arange(24.0).reshape(3, 4, 2)
    before, other = "blocks.1.moe.experts.", np.ones(2)
    state = {f"{before}htoh4.weight": fused, "norm.weight": other}
    parted, origins = convert.part_experts(state)
    wanted = {f"{before}{e}.htoh4.weight": fused[e][None] for e in range(3)}
    assert_same(parted, wanted | {"norm.weight": other})
    assert origins == dict.fromkeys(wanted, f"{before}htoh4.weight")
    with pytest.raises(ValueError, match="single number"):
        convert.part_experts({f"{before}htoh4.bias": np.ones(())})
    with pytest.raises(ValueError, match=r"apart and fused, in .*experts\.0\.htoh4\.weight"):
        convert.part_experts(state | {f"{before}0.htoh4.weight": fused[:1]})


@pytest.mark.parametrize(
    ("block", "stage", "within"), [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 2, 0), (4, 2, 1)]
)
def test_blocks_are_numbered_through_the_stages(block, stage, within):
    assert convert.locate(block, DEPTHS) == (stage, within)
    name = convert.root_name(f"blocks.{within}.norm1.bias", stage=stage, depths=DEPTHS)
    assert name == f"blocks.{block}.norm1.bias"
    assert convert.root_name("head.bias", stage=stage, depths=DEPTHS) == "head.bias"


def test_aliases_of_the_stages_are_not_read(vit_params):
    state = convert.network_to_original(vit_params, depths=DEPTHS)
    aliases = {f"stages.0.{name}": np.zeros(1) for name in state}
    read = convert.network_from_original(state | aliases, depths=DEPTHS, heads=HEADS)
    assert_same(read, vit_params)


def test_a_part_of_a_network_goes_under_its_root_names(vit_params):
    part = {"stage_1": {"block_0": {"norm1": vit_params["stage_1"]["block_0"]["norm1"]}}}
    state = convert.network_to_original(part, depths=DEPTHS)
    assert list(state) == ["blocks.2.norm1.weight", "blocks.2.norm1.bias"]


def test_patches_of_other_images():
    kernel = np.arange(32.0).reshape(16, 2)
    state = convert.stage_to_original({"patches": {"kernel": kernel}}, channels=1)
    assert state["patch_embed.proj.weight"].shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="channels=3"):
        convert.stage_to_original({"patches": {"kernel": kernel}})
    whole = {"stage_0": {"patches": {"kernel": kernel}}}
    assert_same(convert.network_to_original(whole, depths=(1,), channels=1), state)


def drop(name):
    return lambda state: state.pop(name)


def add(name):
    return lambda state: state.update({name: np.zeros((1, 1))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("blocks.0.attn.qkv.weight"), r"attn\.qkv\.weight is missing"),
        (drop("blocks.0.norm1.bias"), r"blocks\.0\.norm1\.bias is missing"),
        (drop("blocks.0.moe.gate.gate.weight"), r"gate\.gate\.weight is missing"),
        (drop("blocks.0.post_stitch.ln.bias"), r"post_stitch\.ln\.bias is missing"),
        (drop("blocks.0.moe.experts.1.htoh4.bias"), r"<e>\.htoh4\.bias is missing for experts"),
        (add("blocks.0.moe.experts.htoh4.bias"), "fused as well"),
        (add("blocks.0.mlp.fc1.weight"), "both an mlp and a moe"),
        (add("blocks.2.norm1.weight"), r"blocks\.1\.norm1\.weight is missing"),
        (add("head.weight"), r"(?s)head\.bias is missing.*norm\.weight is missing"),
        (add("blocks.0.attn.relative"), r"blocks\.0\.attn\.relative is unknown"),
        (add("dist_token"), "dist_token is unknown"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message, vmoe_params):
    state = convert.stage_to_original(vmoe_params["stage_1"])
    change(state)
    with pytest.raises(ValueError, match=message):
        convert.stage_from_original(state, heads=HEADS)


def test_a_network_that_does_not_fit_is_refused(vit_params):
    state = convert.network_to_original(vit_params, depths=DEPTHS)
    with pytest.raises(ValueError, match=r"depths=\(2, 1, 1\) are blocks 0\.\.3"):
        convert.network_from_original(state, depths=(2, 1, 1), heads=HEADS)
    with pytest.raises(ValueError, match="does not split into 4 heads"):
        convert.network_from_original(state, depths=DEPTHS, heads=4)
    headless = {name: array for name, array in state.items() if name != "head.bias"}
    with pytest.raises(ValueError, match=r"lacks \['head.bias'\]"):
        convert.network_from_original(headless, depths=DEPTHS, heads=HEADS)


def test_parameters_that_the_original_has_no_name_for_are_refused(vit_params):
    with pytest.raises(ValueError, match="block_0/gain"):
        convert.stage_to_original({"block_0": {"gain": np.ones(1)}})
    with pytest.raises(ValueError, match="stage_3"):
        convert.network_to_original({"stage_3": {}}, depths=DEPTHS)
