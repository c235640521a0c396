"""A NAC's config: the published defaults, and which part of the network each field reaches."""

import dataclasses
import re

import jax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from common_jax.mesh import MeshConfig, make_mesh, match_rules
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac import model
from m2mkd_jax.nac.blocks import BlockConfig
from m2mkd_jax.nac.graphs import PriorConfig
from m2mkd_jax.nac.kernel import KernelConfig
from m2mkd_jax.nac.latents import GraphConfig, LatentConfig
from m2mkd_jax.nac.layers import LinearConfig
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.nac.network import ReadInConfig, ReadOutConfig, Wiring
from m2mkd_jax.nac.tokenizer import TokenizerConfig

INTERFACE = Interface(16, 3, 7)
# Every field of a part differs from its default, and all numbers from each other.
LINEAR = LinearConfig("plain", weight_gain=2.0)
KERNEL = KernelConfig(truncation=0.4, temperature=0.3)
CONFIG = NacConfig(
    tokenizer=TokenizerConfig("atto", width=8, stem=2, grid_width=5),
    inputs=11,
    mediators=12,
    outputs=13,
    iterations=3,
    width=14,
    code_width=15,
    signature_width=16,
    heads=2,
    head_width=17,
    read_in_heads=3,
    read_out_heads=4,
    ffn_factor=1.5,
    geglu=False,
    qkv_bias=True,
    layer_scale=0.2,
    linear=LINEAR,
    kernel=KERNEL,
    mask=False,
    share_norm=False,
    code_noise=0.07,
    seeding="mean",
    read_in="projection",
    read_in_scale=0.6,
    read_in_residual=False,
    read_out_residual=True,
    read_out_head=True,
    read_out_head_norm=False,
    pooling="softmax",
    temperature=0.8,
    inputs_to_mediators="first",
    inputs_to_outputs=False,
    share_codes=False,
    identical_codes=True,
    attention="auto",
)
BLOCK = BlockConfig(
    width=14,
    code_width=15,
    heads=2,
    head_width=17,
    qkv_bias=True,
    ffn_factor=1.5,
    geglu=False,
    layer_scale=0.2,
    linear=LINEAR,
    code_noise=0.07,
    drop_path=0.0,
    residual=True,
    share_norm=False,
    kernel=KERNEL,
    mask=False,
)


def change(**changes) -> NacConfig:
    return dataclasses.replace(CONFIG, **changes)


# Defaults.

# As in the original's configs for Tiny-ImageNet.
PUBLISHED = {
    "inputs": 64,
    "mediators": 256,
    "outputs": 64,
    "iterations": 8,
    "width": 384,
    "code_width": 384,
    "signature_width": 64,
    "heads": 6,
    "head_width": 64,
    "ffn_factor": 2.0,
    "geglu": True,
    "qkv_bias": False,
    "layer_scale": 0.1,
    "mask": True,
    "share_norm": True,
    "code_noise": 0.05,
    "seeding": "noise",
    "seeder_code_noise": True,
    "read_in": "attention",
    "read_in_scale": 1.0,
    "read_in_residual": True,
    "read_out_residual": False,
    "read_out_head": False,
    "read_out_head_norm": True,
    "pooling": "gumbel",
    "temperature": 1.0,
    "inputs_to_mediators": "always",
    "inputs_to_outputs": True,
    "inputs_as_mediators": False,
    "share_propagators": False,
    "share_ffns": False,
    "share_codes": True,
    "identical_codes": False,
    "learn_codes": True,
    "learn_signatures": True,
}


def test_the_defaults_are_the_published_ones():
    config = NacConfig()
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED
    assert config.linear == LinearConfig(
        kind="modulated",
        normalization="layer",
        gain=0.1,
        learnable_gain=True,
        add_one=True,
        renormalization="none",
        dropout=0.0,
        weight_gain=1.0,
        activation="none",
    )
    assert config.prior.graph == "none"
    assert config.tokenizer == TokenizerConfig("tiny", stages=2, width=384, stem=4, grid_width=64)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("imagenet", "imagenet"),
        ("imnet", "imagenet"),
        ("tinyimagenet", "tinyimagenet"),
        ("tinyimnet", "tinyimagenet"),
        ("tinynet", "tinyimagenet"),
    ],
)
def test_students_accepts_original_spellings(given, meant):
    assert change(students=given).students == meant


def test_presets_match_published_sizes():
    changed = {"inputs": 192, "mediators": 768, "width": 512, "code_width": 512, "heads": 8}
    want = NacConfig(tokenizer=TokenizerConfig(width=512), ffn_factor=1.0, **changed)
    assert model.preset("imagenet") == (want, 224, 1000)
    assert model.preset("tinyimagenet") == (NacConfig(), 64, 200)
    with pytest.raises(ValueError, match="preset 'cifar'"):
        model.preset("cifar")


# Parts.


def test_fields_reach_the_whole_network():
    network = model.build(CONFIG, INTERFACE, drop_path=0.1)
    propagator = dataclasses.replace(BLOCK, drop_path=0.1)
    assert [part.config for part in network.propagators] == [propagator] * 3
    read_in = dataclasses.replace(BLOCK, heads=3, kernel=None, residual=False)
    assert network.read_in.config == ReadInConfig(read_in, "projection", 0.6)
    kernel = KernelConfig(truncation=None, stochastic=False)  # regardless of the mediators' kernel
    read_out = dataclasses.replace(BLOCK, heads=4, kernel=kernel)
    assert network.read_out.config == ReadOutConfig(read_out, "softmax", 0.8, 7, False)
    assert network.wiring == Wiring("first", False, False)
    assert len(network) == len(CONFIG.depths) == 5
    assert not network.share_propagators and not network.share_ffns and not network.remat


def test_norms_are_shared_only_in_propagators():
    config = change(share_norm=True, read_out_residual=False, read_out_head=False)
    assert config.propagator(0, drop_path=0.0).share_norm
    read_out = config.read_out_config(7)
    assert not read_out.block.share_norm and not read_out.block.residual
    assert read_out.head is None


def test_zero_read_in_and_read_out_heads_default_to_heads():
    config = change(read_in_heads=0, read_out_heads=0)
    assert config.read_in_config().block.heads == config.read_out_config(7).block.heads == 2


def test_fields_reach_the_latents():
    want = GraphConfig(
        input=LatentConfig(11),
        mediator=LatentConfig(12, layers=3, identical_codes=True),
        output=LatentConfig(13),
        width=14,
        signature_width=16,
        code_width=15,
        seeding="mean",
        code_noise=0.07,
    )
    assert CONFIG.graph() == want
    assert change(seeder_code_noise=False).graph() == dataclasses.replace(want, code_noise=0.0)
    shared = dataclasses.replace(want.mediator, layers=None)
    assert change(share_codes=True).graph().mediator == shared
    graph = change(prior=PriorConfig("complete")).graph()
    assert all(
        getattr(graph, name).identical_signatures for name in ("input", "mediator", "output")
    )


def test_switches_reach_the_whole_network():
    changes = {"share_propagators": True, "share_ffns": True, "remat": True}
    network = model.build(change(**changes), INTERFACE)
    assert all(getattr(network, name) for name in changes)
    wiring = change(
        inputs_as_mediators=True, mediators=11, inputs_to_mediators="never", inputs_to_outputs=True
    )
    assert model.build(wiring, INTERFACE).wiring == Wiring("never", True, True)


def test_layerwise_values_reach_only_their_iteration():
    layerwise = {"ffn_factor": (1.0, 2.0, 3.0), "kernel/truncation": (0.1, None, 0.3)}
    network = model.build(change(layerwise=layerwise), INTERFACE, drop_path=0.1)
    found = [
        (part.config.ffn_factor, part.config.kernel.truncation) for part in network.propagators
    ]
    assert found == [(1.0, 0.1), (2.0, None), (3.0, 0.3)]
    assert {part.config.drop_path for part in network.propagators} == {0.1}
    assert {part.config.kernel.temperature for part in network.propagators} == {0.3}


def test_fields_reach_the_students():
    layerwise = {"ffn_factor": (1.0, 2.0, 3.0)}
    students = model.build_students(
        change(layerwise=layerwise),
        INTERFACE,
        meta_width=16,
        meta_tokens=5,
        seed=9,
        drop_path=0.1,
    ).stages
    bare = dataclasses.replace(BLOCK, kernel=None, code_noise=0.0)
    read_in = dataclasses.replace(bare, heads=3, residual=False)
    assert students[0].config == ReadInConfig(read_in, "attention", 0.6)
    want = [dataclasses.replace(bare, drop_path=0.1, ffn_factor=f) for f in (1.0, 2.0, 3.0)]
    assert [student.config for student in students[1:-1]] == want
    read_out = dataclasses.replace(bare, heads=4)
    assert students[-1].config == ReadOutConfig(read_out, "softmax", 0.8, None, False)
    assert {(student.seed, student.stitch_width) for student in students} == {(9, 16)}
    shapes = [student.example(2).shape for student in students]
    assert shapes == [(2, 16, 16, 3)] + [(2, 5, 16)] * 4


def test_too_small_image_is_refused():
    with pytest.raises(ValueError, match=r"config\.data\.image_size=3 is too small"):
        model.build(CONFIG, Interface(3, 3, 7))


# Parameters.

OWN = [
    f"student/graph/{name}/{array}"
    for name in ("input", "mediator", "output")
    for array in ("codes", "signatures", "states")
]


@pytest.mark.parametrize(
    ("changes", "fixed"),
    [
        ({}, ()),
        ({"learn_codes": False}, ("codes",)),
        ({"learn_signatures": False}, ("signatures",)),
        ({"learn_codes": False, "learn_signatures": False}, ("codes", "signatures")),
    ],
)
def test_fixed_codes_and_signatures_are_not_trained(changes, fixed):
    regex = change(**changes).trainable()
    others = ["student/stage_1/attention/query/code_kernel", "student/graph/seeder/mean/kernel"]
    trained = [name for name in OWN + others if re.fullmatch(regex, name)]
    assert trained == [name for name in OWN if not name.endswith(fixed or ("-",))] + others


def test_matrices_are_sharded_along_their_longer_axis():
    config = NacConfig(
        tokenizer=TokenizerConfig("atto", width=8, stem=2, grid_width=4),
        iterations=1,
        width=16,
        code_width=8,
        heads=2,
        head_width=16,
    )
    shapes = jax.eval_shape(model.build(config, Interface(16, 3, 8)).init, jax.random.key(0))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    specs = match_rules(model.PARTITION_RULES, shapes, mesh)
    attention, ffn = specs["stage_1"]["attention"], specs["stage_1"]["ffn"]
    rows = [attention["query"]["kernel"], attention["key"]["code_kernel"], ffn["up"]["kernel"]]
    rows += [specs["graph"]["seeder"]["mean"]["kernel"]]
    columns = [attention["exit"]["kernel"], ffn["down"]["kernel"]]
    whole = [specs["graph"]["input"]["codes"], attention["bandwidth"], attention["query"]["gain"]]
    whole += [specs["stage_2"]["pooling"]["head"]["kernel"]]
    assert {spec_of(x) for x in rows} == {P("fsdp")}
    assert {spec_of(x) for x in columns} == {P(None, "fsdp")}
    assert {spec_of(x) for x in whole} == {P()}


def spec_of(sharding) -> P:
    return getattr(sharding, "spec", sharding)


@pytest.mark.parametrize("pooling", ["softmax", "gumbel_hard"])
def test_fsdp_need_not_divide_the_labels(pooling):
    """With a read-out head, the pooling's input axis is the 7 labels."""
    config = dataclasses.replace(tiny.NAC, read_out_head=True, pooling=pooling)
    network = model.build(config, dataclasses.replace(INTERFACE, image_size=8))
    params = {"student": jax.eval_shape(network.init, jax.random.key(0))}
    specs = match_rules(model.PARTITION_RULES, params, make_mesh(MeshConfig(fsdp=2)))
    pooling = specs["student"]["stage_2"]["pooling"]["confidence"]["kernel"]
    assert spec_of(pooling) == P()
