"""The networks: sizes of the published variants, stages, and which blocks and parameters have
experts, stitches and shards."""

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from meshes import idle_rules, one_device
from tiny import count_parameters

from common_jax.mesh import match_rules
from m2mkd_jax.models import encoder, vit, vmoe
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.stages import Network, Place, stage_name

# Parameter counts at the usual depth with 1000 labels, as in the original.
VIT_PARAMETERS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_base_patch16_384": 86_859_496,
    "vit_small_patch16_224": 48_754_408,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch16_384": 86_859_496,
    "vit_base_patch32_384": 88_297_192,
    "vit_large_patch16_224": 304_326_632,
    "vit_large_patch16_384": 304_715_752,
    "vit_large_patch32_384": 306_632_680,
    "vit_huge_patch14_224": 631_922_920,
    "vit_huge_patch14_392": 632_598_760,
    "vit_huge_patch32_384": 634_959_080,
}
VMOE_BASE_PARAMETERS = 483_325_768  # 12 blocks of 8 experts
STUDENT_PARAMETERS = (121_984_792, 122_031_384, 122_012_928)  # of V-MoE-Base: first, middle, last

ONE_DEVICE = one_device()
TINY = {"patch": 4, "width": 8, "heads": 2, "mlp_ratio": 2.0}
IMAGES = encoder.Interface(image_size=8, channels=3, labels=5)


def shapes_of(network, *, only=None):
    return jax.eval_shape(lambda key: network.init(key, only=only), jax.random.key(0))


def random_params(network):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes_of(network)
    )


def count(shapes) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def published(image_size: int) -> encoder.Interface:
    return encoder.Interface(image_size=image_size, channels=3, labels=1000)


def test_every_vit_variant_has_a_parameter_count():
    assert set(VIT_PARAMETERS) == set(vit.VARIANTS)


@pytest.mark.parametrize("name", VIT_PARAMETERS)
def test_published_vits_have_the_published_sizes(name):
    config, image_size = vit.variant(name)
    build = functools.partial(vit.build, interface=published(image_size))
    assert count_parameters(build, config) == VIT_PARAMETERS[name]


def test_published_vit_matches_partition_rules():
    name = "deit_tiny_patch16_224"
    config, image_size = vit.variant(name)
    shapes = shapes_of(vit.build(config, published(image_size)))
    assert count(shapes) == VIT_PARAMETERS[name]
    # Raises if no rule matches a parameter.
    match_rules(vit.PARTITION_RULES, shapes, ONE_DEVICE)


@pytest.mark.parametrize("name", vmoe.VARIANTS)
def test_published_vmoes_have_the_published_sizes(name):
    config, image_size = vmoe.variant(name)
    build = functools.partial(vmoe.build, interface=published(image_size), stitch_width=None)
    parameters = count_parameters(build, config)
    # The trunk of the ViT, with biased projections, and 8 experts and a gate in place of every MLP.
    sizes = {"patch": config.patch, "width": config.width, "heads": config.heads}
    build = functools.partial(vit.build, interface=published(image_size))
    trunk = count_parameters(build, vit.ViTConfig(depths=config.depths, **sizes))
    width = config.width
    mlp, gate = 8 * width**2 + 5 * width, 8 * width + 8
    depth = sum(config.depths)
    assert parameters == trunk + depth * (7 * mlp + gate)
    if name == "vmoe_base":
        assert parameters == VMOE_BASE_PARAMETERS
    assert config.qkv_bias and config.norm_eps == 1e-6


def test_published_students_have_the_published_sizes():
    config, image_size = vmoe.variant("vmoe_base", depths=(3, 3, 3, 3))
    students = vmoe.build_students(config, published(image_size), meta_width=1024)
    for stage, expected in zip((0, 2, 3), STUDENT_PARAMETERS, strict=True):
        assert count(shapes_of(students, only=(stage,))) == expected
    shapes = shapes_of(students)
    match_rules(vmoe.PARTITION_RULES, shapes, ONE_DEVICE)
    dense = vmoe.build(
        vmoe.VMoEConfig(depths=(1,), moe_blocks="none"), published(224), stitch_width=None
    )
    assert idle_rules(vmoe.PARTITION_RULES, shapes, shapes_of(dense)) == []


def test_vits_without_bias_use_the_other_epsilon():
    for name in vit.VARIANTS:
        config, _ = vit.variant(name)
        plain = name.startswith(("vit_small", "vit_huge"))
        assert (config.qkv_bias, config.norm_eps) == ((False, 1e-5) if plain else (True, 1e-6))


def test_defaults_match_the_base_networks():
    base = {
        "patch": 16,
        "width": 768,
        "heads": 12,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "norm_eps": 1e-6,
        "activation": "gelu",
        "layer_scale": None,
        "patch_bias": True,
        "class_token": True,
        "registers": 0,
        "positions": "all",
        "norm_pre": False,
        "pool": "class",
        "norm_after_pool": False,
        "depths": (3, 3, 3, 3),
        "attention": "auto",
        "remat": False,
        "scan_layers": False,
    }
    assert dataclasses.asdict(vit.ViTConfig()) == base
    config = dataclasses.asdict(vmoe.VMoEConfig())
    assert config.pop("moe") == dataclasses.asdict(MoeConfig())
    assert config == base | {"kind": "vmoe", "moe_blocks": "all", "stitches": "dropped"}
    assert encoder.BlockConfig() == encoder.BlockConfig(0.0, None, None, None)


def test_published_networks_have_the_published_heads():
    # 16 heads of width 80 in the huge ones, 8 of width 96 in ViT-Small, else heads of width 64.
    for module in (vit, vmoe):
        for name in module.VARIANTS:
            config, image_size = module.variant(name)
            heads = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}[config.width]
            assert config.heads == (8 if name.startswith("vit_small") else heads)
            side = re.search(r"_(\d{3})$", name)
            assert image_size == int(side[1] if side else 224)
    assert module.variant("vmoe_huge", (2, 3))[0].depths == (2, 3)


@pytest.mark.parametrize(
    ("width", "ratio", "hidden"), [(10, 2.55, 25), (10, 0.19, 1), (8, 4.0, 32)]
)
def test_the_hidden_width_is_rounded_down(width, ratio, hidden):
    config = vit.ViTConfig(width=width, heads=2, mlp_ratio=ratio)
    assert config.encoder.hidden == hidden


def test_matrices_are_sharded_by_width_and_experts_by_expert_axis():
    # All sizes differ: the width is 8, and the meta model's tokens have width 12.
    config = vmoe.VMoEConfig(depths=(1, 2), moe=MoeConfig(experts=3), moe_blocks="1", **TINY)
    students = vmoe.build_students(config, encoder.Interface(8, 3, 5), meta_width=12)
    shapes = shapes_of(students)
    shardings = match_rules(vmoe.PARTITION_RULES, shapes, ONE_DEVICE)
    flat = traverse_util.flatten_dict(shardings, sep="/")
    split = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        axes = [*flat[path].spec, *[None] * (leaf.ndim - len(flat[path].spec))]
        name = re.sub(r"stage_\d/(block_\d/)?", "", path)
        split[name] = {axis: leaf.shape[i] for i, axis in enumerate(axes) if axis}
    width, expert = {"fsdp": 8}, {"expert": 3}
    wanted = {
        "patches/kernel": width,
        "attention/qkv/kernel": width,
        "attention/out/kernel": width,
        "mlp/up/kernel": width,
        "mlp/down/kernel": width,
        "head/kernel": width,
        "moe/up": expert | width,
        "moe/down": expert | width,
        "moe/up_bias": expert,
        "moe/down_bias": expert,
        "pre_stitch/linear/kernel": {"fsdp": 12},
        "post_stitch/linear/kernel": width,
    }
    assert {name: axes for name, axes in split.items() if axes} == wanted


@pytest.mark.parametrize("variant", [vit.variant, vmoe.variant])
def test_unknown_variant_lists_the_known_ones(variant):
    with pytest.raises(ValueError, match="_base"):
        variant("giant")


def networks():
    vmoe_config = vmoe.VMoEConfig(
        depths=(2, 1, 1), moe=MoeConfig(experts=3), moe_blocks="1,3", **TINY
    )
    return {
        "vit": vit.build(vit.ViTConfig(depths=(2, 1, 1), **TINY), IMAGES),
        "vmoe": vmoe.build(vmoe_config, IMAGES, stitch_width=None),
        "stitched": vmoe.build(vmoe_config, IMAGES, stitch_width=12),
        "one stage": vit.build(vit.ViTConfig(depths=(2,), **TINY), IMAGES),
    }


@pytest.mark.parametrize("name", ["vit", "vmoe", "stitched", "one stage"])
def test_chained_stages_match_the_whole_bit_for_bit(name):
    network = networks()[name]
    params = random_params(network)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    whole, _ = network.apply(params, images)
    x = images
    for i in range(len(network)):
        x, _ = network.apply({stage_name(i): params[stage_name(i)]}, x, start=i, stop=i + 1)
    np.testing.assert_array_equal(x, whole)
    assert whole.shape == (2, 5)
    np.testing.assert_array_equal(network.apply(params, images, start=1, stop=1)[0], images)


def test_missing_stage_is_named():
    network = networks()["vit"]
    params = random_params(network)
    del params["stage_1"]
    with pytest.raises(KeyError, match="stage_1"):
        network.apply(params, jnp.zeros((1, 8, 8, 3)))


def test_stage_initialisation_is_independent_of_other_stages():
    network = vit.build(vit.ViTConfig(depths=(1, 1), **TINY), IMAGES)
    alone, together = (network.init(jax.random.key(3), only=only) for only in ((1,), None))
    jax.tree.map(np.testing.assert_array_equal, alone["stage_1"], together["stage_1"])


def test_places():
    assert [Place.of(i, 3) for i in range(3)] == [Place.FIRST, Place.MIDDLE, Place.LAST]
    assert Place.of(0, 1) is Place.ONLY
    for stage in (-1, 3):
        with pytest.raises(IndexError, match=r"0\.\.2"):
            Place.of(stage, 3)


def test_students_have_stitches_and_experts_where_configured():
    config = vmoe.VMoEConfig(depths=(2, 2, 1), moe_blocks="every_2", **TINY)
    students = vmoe.build_students(config, IMAGES, meta_width=12)
    blocks = [block for stage in students.stages for block in stage.blocks]
    assert [block.pre_stitch for block in blocks] == [None, None, 12, None, 12]
    assert [block.post_stitch for block in blocks] == [None, 12, None, 12, None]
    assert [block.moe is not None for block in blocks] == [False, True, False, True, False]
    assert [stage.example(2).shape for stage in students.stages] == [
        (2, 8, 8, 3),
        (2, 5, 12),
        (2, 5, 12),
    ]


def test_moe_blocks_are_numbered_across_stages():
    config = vmoe.VMoEConfig(depths=(1, 2, 1), moe_blocks="every_2", **TINY)
    whole = vmoe.build(config, IMAGES, stitch_width=None)
    for network in (whole, vmoe.build_students(config, IMAGES, meta_width=12)):
        blocks = [block for stage in network.stages for block in stage.blocks]
        assert [block.moe is not None for block in blocks] == [False, True, False, True]


@pytest.mark.parametrize(
    ("blocks", "positions"),
    [
        ("all", {0, 1, 2, 3}),
        ("none", set()),
        ("every_2", {1, 3}),
        ("last_2", {2, 3}),
        ("0,3", {0, 3}),
        ("3,1,3", {1, 3}),
        ("every_1", {0, 1, 2, 3}),
        ("every_3", {2}),
        ("every_4", {3}),
        ("every_5", set()),
        ("last_1", {3}),
        ("last_9", {0, 1, 2, 3}),
    ],
)
def test_moe_positions_by_hand(blocks, positions):
    assert vmoe.moe_positions(blocks, 4) == positions


@pytest.mark.parametrize(
    "blocks",
    ["4", "0,4", "-1", "every", "every_0", "last_0", "xlast_2", "last_2x", "some", "1,,2", ""],
)
def test_invalid_moe_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="moe_blocks"):
        vmoe.moe_positions(blocks, 4)


def test_stochastic_depth_ramps_over_network_and_within_each_student():
    def rates(network):
        return [[block.drop_path for block in stage.blocks] for stage in network.stages]

    config = vmoe.VMoEConfig(depths=(3, 2), **TINY)
    whole = rates(vmoe.build(config, IMAGES, stitch_width=None, drop_path=0.4))
    np.testing.assert_allclose([*itertools.chain(*whole)], [0, 0.1, 0.2, 0.3, 0.4])
    whole = rates(vit.build(vit.ViTConfig(depths=(1, 2), **TINY), IMAGES, drop_path=0.4))
    np.testing.assert_allclose([*itertools.chain(*whole)], [0, 0.2, 0.4])
    students = rates(vmoe.build_students(config, IMAGES, meta_width=8, drop_path=0.4))
    np.testing.assert_allclose(students[0], [0, 0.2, 0.4])
    np.testing.assert_allclose(students[1], [0, 0.4])
    assert encoder.drop_path_rates(0.4, 1) == [0]


def test_stochastic_depth_only_in_training():
    network = encoder.ramp_drop_path(networks()["one stage"], 0.9)
    params = random_params(network)
    images = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
    plain, _ = networks()["one stage"].apply(params, images)
    np.testing.assert_array_equal(network.apply(params, images)[0], plain)
    keys = {"drop_path": jax.random.key(2)}
    dropped, _ = network.apply(params, images, train=True, rngs=keys)
    assert not np.allclose(dropped, plain)


def test_empty_stages_and_indivisible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"^depths\[1\]=0 must be at least 1"):
        vit.build(vit.ViTConfig(depths=(1, 0), **TINY), IMAGES)
    with pytest.raises(ValueError, match=r"^patch=4 must divide config\.data\.image_size=10"):
        vit.build(vit.ViTConfig(**TINY), encoder.Interface(10, 3, 5))
    with pytest.raises(ValueError, match=r"^heads=3 must divide width=8"):
        vit.build(vit.ViTConfig(width=8, heads=3), encoder.Interface(32, 3, 5))


def test_images_of_another_size_are_refused():
    network = networks()["vit"]
    params = random_params(network)
    with pytest.raises(ValueError, match="image_size"):
        network.apply(params, jnp.zeros((1, 12, 12, 3)))


def test_network_length_is_its_number_of_stages():
    assert len(Network(())) == 0
    assert len(networks()["vit"]) == 3
