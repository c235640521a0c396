"""Names of NAC tensors: exact in both directions, one copy of what is shared, and clear errors for
what does not fit."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from same import assert_same

from common_jax.weights import table as tables
from common_jax.weights.table import Table
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac import model
from m2mkd_jax.nac import names as nac_names
from m2mkd_jax.nac.layers import CodeLinear, LinearConfig
from m2mkd_jax.nac.tokenizer import TokenizerConfig
from m2mkd_jax.stages import Place

ITERATIONS = 3
SIZES = model.NacConfig(
    tokenizer=TokenizerConfig(preset="nano", width=16, grid_width=5),
    inputs=4,
    mediators=6,
    outputs=2,
    iterations=ITERATIONS,
    width=12,
    code_width=10,
    signature_width=7,
    heads=2,
    head_width=4,
)
INTERFACE = Interface(16, 3, 9)
PROPAGATOR = "latent_graphs.0.propagators."
PLACES = (Place.FIRST, *[Place.MIDDLE] * ITERATIONS, Place.LAST)


def fill(shapes):
    """numpy arrays with a distinct number in every place."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def read(table, state, params):
    """Parameters in the shapes of `params`."""
    return tables.read(table, state, shapes=params, file="a.pth")[0]


def random_network(**changes):
    """Parameters of a whole NAC, and the table of its names."""
    config = dataclasses.replace(SIZES, **changes)
    network = model.build(config, INTERFACE)
    params = fill(jax.eval_shape(network.init, jax.random.key(0)))
    return params, nac_names.network_table(config)


def random_students():
    network = model.build_students(SIZES, INTERFACE, meta_width=8, meta_tokens=5, seed=0)
    return fill(jax.eval_shape(network.init, jax.random.key(0)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_propagators": True},
        {"share_ffns": True},
        {"share_codes": False, "seeding": "learned", "share_norm": False, "qkv_bias": True},
        {"seeding": "mean", "layer_scale": None, "read_in_scale": None},
        {"seeding": "code", "code_width": 12, "linear": LinearConfig(kind="plain")},
        {"linear": LinearConfig(learnable_gain=False), "read_in": "projection"},
        {"pooling": "first_slot", "read_out_head": True},
        {"read_out_head": True, "read_out_head_norm": False},
    ],
)
def test_whole_nac_round_trips(changes):
    params, table = random_network(**changes)
    state = tables.write(table, params)
    assert_same(read(table, state, params), params)
    kind = dataclasses.replace(SIZES, iterations=1, **changes).linear.kind
    small = nac_names.network_table(model.NacConfig(linear=LinearConfig(kind=kind)))
    assert tables.misfits(small, state) == []


def test_students_round_trip():
    for (name, params), place in zip(random_students().items(), PLACES, strict=True):
        table = nac_names.student_table(SIZES, place)
        state = tables.write(table, params)
        assert_same(read(table, state, params), params)
        assert len(state) == len(jax.tree.leaves(params)), name


@pytest.mark.parametrize("kind", ["modulated", "plain", "weight_modulated"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_code_conditioned_layers_round_trip(kind, use_bias):
    layer = CodeLinear(LinearConfig(kind=kind), 3, 5, 4, use_bias, jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((2, 1, 3)), jnp.zeros((1, 4)))
    params = fill(shapes["params"])
    table = Table(nac_names.code_linear(kind))
    assert_same(read(table, tables.write(table, params), params), params)


def test_names_and_shapes_match_original():
    params, table = random_network(share_codes=False)
    shapes = {name: array.shape for name, array in tables.write(table, params).items()}
    graph = "latent_graphs.0."
    assert shapes["input_tokenizer.backbone.downsample_layers.0.0.weight"] == (4, 3, 4, 4)
    assert shapes["input_tokenizer.backbone.downsample_layers.1.1.weight"] == (8, 4, 2, 2)
    assert shapes["input_tokenizer.backbone.stages.1.0.dwconv.weight"] == (8, 1, 7, 7)
    assert shapes["input_tokenizer.positional_grid.grid"] == (5, 2, 2)
    assert shapes[f"{graph}input_latents.signatures_"] == (4, 7)
    assert shapes[f"{graph}mediator_latents.codes_"] == (ITERATIONS, 6, 10)
    assert shapes[f"{graph}latent_seeder.code_to_state_logvar.weight"] == (12, 10)
    assert shapes[f"{graph}read_in.read_in_attention.key_compiler.native_weight"] == (8, 13)
    assert shapes[f"{graph}read_in.read_in_attention.key_compiler.scale.weight"] == (13, 10)
    assert shapes[f"{PROPAGATOR}2.latent_attention.kernel.bandwidth"] == ()
    assert shapes[f"{PROPAGATOR}0.ffn.ffn.0.native_weight"] == (48, 12)
    assert shapes[f"{PROPAGATOR}0.ffn.ffn.2.native_bias"] == (12,)
    assert shapes[f"{graph}read_out.latent_attention.sender_layernorm.weight"] == (12,)
    assert shapes["output_tokenizer.to_logits.weight"] == (9, 12)


def test_converted_layouts_give_the_same_products():
    params, table = random_network()
    state = tables.write(table, params)
    rng = np.random.default_rng(1)
    tokenizer, attention = params["stage_0"]["tokenizer"], params["stage_1"]["attention"]
    square, x = rng.standard_normal((4, 4, 3)), rng.standard_normal(12)
    stem = state["input_tokenizer.backbone.downsample_layers.0.0.weight"]
    want = np.einsum("IJC,DCIJ->D", square, stem)
    got = np.einsum("IJC,IJCD->D", square, tokenizer["stem"]["kernel"])
    np.testing.assert_allclose(got, want)
    weight = state[f"{PROPAGATOR}0.latent_attention.query_compiler.native_weight"]
    np.testing.assert_allclose(x @ attention["query"]["kernel"], weight @ x)
    grid = state["input_tokenizer.positional_grid.grid"]
    np.testing.assert_array_equal(tokenizer["grid"][1, 0], grid[:, 1, 0])


@pytest.mark.parametrize(
    ("switch", "shared", "own"),
    [
        ("share_propagators", "latent_attention.exit_layer.native_bias", None),
        ("share_propagators", "ffn.layer_scale.gamma", None),
        ("share_ffns", "ffn.ffn.2.scale_gain", "latent_attention.kernel.bandwidth"),
    ],
)
def test_shared_tensors_are_listed_per_iteration_and_stored_once(switch, shared, own):
    params, table = random_network(**{switch: True})
    assert "ffn" not in params.get("stage_2", {})
    state = tables.write(table, params)
    for i in range(1, ITERATIONS):
        first, alias = (state[f"{PROPAGATOR}{j}.{shared}"] for j in (0, i))
        np.testing.assert_array_equal(alias, first)
        if own is not None:
            assert np.any(state[f"{PROPAGATOR}0.{own}"] != state[f"{PROPAGATOR}{i}.{own}"])
    state[f"{PROPAGATOR}2.{shared}"] = state[f"{PROPAGATOR}2.{shared}"] + 1
    problem = f"{PROPAGATOR}2.{shared} should equal {PROPAGATOR}0.{shared}"
    with pytest.raises(ValueError, match=re.escape(problem)):
        read(table, state, params)


def test_partial_network_is_written_under_full_names():
    params, table = random_network()
    part = {"stage_2": {"ffn": {"norm": params["stage_2"]["ffn"]["norm"]}}}
    state = tables.write(table, part)
    names = (f"{PROPAGATOR}1.ffn.layernorm.weight", f"{PROPAGATOR}1.ffn.layernorm.bias")
    assert tuple(state) == names


def test_unknown_tensors_are_refused_by_name():
    params, table = random_network()
    state = tables.write(table, params)
    strange = {"latent_graphs.0.stitch_norm.weight": np.ones(1), "head.weight": np.ones(1)}
    with pytest.raises(ValueError, match=r"(?s)head\.weight.*stitch_norm\.weight"):
        read(table, state | strange, params)
    fewer = dataclasses.replace(SIZES, iterations=2)
    shapes = jax.eval_shape(model.build(fewer, INTERFACE).init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"propagators\.2\."):
        read(nac_names.network_table(fewer), state, shapes)
    with pytest.raises(ValueError, match="ffn/gate"):
        tables.write(Table(nac_names.propagator("plain")), {"ffn": {"gate": np.ones(1)}})
    with pytest.raises(ValueError, match="stage_9"):
        tables.write(table, {"stage_9": {"ffn": {"layer_scale": np.ones(1)}}})


# The original's names -> where their tensors are here; matrices are transposed.
ATTENTION = {
    "receiver_layernorm.weight": "receiver_norm/scale",
    "receiver_layernorm.bias": "receiver_norm/bias",
    "sender_layernorm.weight": "sender_norm/scale",
    "sender_layernorm.bias": "sender_norm/bias",
    "query_compiler.native_weight": "query/kernel",
    "query_compiler.native_bias": "query/bias",
    "query_compiler.scale_gain": "query/gain",
    "query_compiler.scale.weight": "query/code_kernel",
    "key_compiler.native_weight": "key/kernel",
    "key_compiler.scale.weight": "key/code_kernel",
    "value_compiler.native_weight": "value/kernel",
    "value_compiler.scale.weight": "value/code_kernel",
    "exit_layer.native_weight": "exit/kernel",
    "exit_layer.native_bias": "exit/bias",
    "layer_scale.gamma": "layer_scale",
}
FFN = {
    "layernorm.weight": "norm/scale",
    "layernorm.bias": "norm/bias",
    "ffn.0.native_weight": "up/kernel",
    "ffn.0.scale.weight": "up/code_kernel",
    "ffn.2.native_weight": "down/kernel",
    "ffn.2.scale.weight": "down/code_kernel",
    "layer_scale.gamma": "layer_scale",
}
GRAPH = {
    "input_latents.signatures_": "input/signatures",
    "input_latents.codes_": "input/codes",
    "mediator_latents.codes_": "mediator/codes",
    "output_latents.signatures_": "output/signatures",
    "latent_seeder.layernorm.weight": "seeder/norm/scale",
    "latent_seeder.code_to_state_mu.weight": "seeder/mean/kernel",
    "latent_seeder.code_to_state_mu.bias": "seeder/mean/bias",
    "latent_seeder.code_to_state_logvar.weight": "seeder/log_variance/kernel",
    "latent_seeder.code_to_state_logvar.bias": "seeder/log_variance/bias",
}
BLOCK = {
    "gamma": "gamma",
    "dwconv.bias": "depthwise/bias",
    "norm.weight": "norm/scale",
    "norm.bias": "norm/bias",
    "pwconv1.weight": "up/kernel",
    "pwconv1.bias": "up/bias",
    "pwconv2.weight": "down/kernel",
    "pwconv2.bias": "down/bias",
}
TOKENIZER = {
    "backbone.downsample_layers.0.0.bias": "stem/bias",
    "backbone.downsample_layers.0.1.weight": "stem_norm/scale",
    "backbone.downsample_layers.0.1.bias": "stem_norm/bias",
    "backbone.downsample_layers.1.0.weight": "downsample_1/norm/scale",
    "backbone.downsample_layers.1.0.bias": "downsample_1/norm/bias",
    "backbone.downsample_layers.1.1.bias": "downsample_1/conv/bias",
}
POOLING = {
    "confidence_scorer.weight": "confidence/kernel",
    "confidence_scorer.bias": "confidence/bias",
    "to_logits.weight": "head/kernel",
    "to_logits.bias": "head/bias",
}
READ_OUT = {"head.0.module.weight": "norm/scale", "head.1.native_weight": "linear/kernel"}
KERNEL = {"kernel.bandwidth": "bandwidth"}
WHOLE = (
    ("latent_graphs.0.", "graph", GRAPH),
    ("input_tokenizer.", "stage_0/tokenizer", TOKENIZER),
    ("input_tokenizer.backbone.stages.0.0.", "stage_0/tokenizer/block_0_0", BLOCK),
    ("input_tokenizer.backbone.stages.1.0.", "stage_0/tokenizer/block_1_0", BLOCK),
    ("latent_graphs.0.read_in.read_in_attention.", "stage_0/read_in/attention", ATTENTION),
    ("latent_graphs.0.read_in.ffn.", "stage_0/read_in/ffn", FFN),
    (f"{PROPAGATOR}0.latent_attention.", "stage_1/attention", ATTENTION | KERNEL),
    (f"{PROPAGATOR}2.latent_attention.", "stage_3/attention", ATTENTION | KERNEL),
    (f"{PROPAGATOR}2.ffn.", "stage_3/ffn", FFN),
    ("latent_graphs.0.read_out.latent_attention.", "stage_4/attention", ATTENTION | KERNEL),
    ("latent_graphs.0.read_out.ffn.", "stage_4/ffn", FFN),
    ("latent_graphs.0.read_out.", "stage_4/code_head", READ_OUT),
    ("output_tokenizer.", "stage_4/pooling", POOLING),
)


def test_every_tensor_has_its_name():
    params, table = random_network(share_norm=False, qkv_bias=True, read_out_head=True)
    state = tables.write(table, params)
    flat = traverse_util.flatten_dict(params, sep="/")
    for prefix, place, names in WHOLE:
        for name, path in names.items():
            array = np.transpose(flat[f"{place}/{path}"]) if "weight" in name else None
            want = flat[f"{place}/{path}"] if array is None else array
            np.testing.assert_array_equal(state[prefix + name], want, err_msg=prefix + name)


def test_students_have_their_names():
    tensors = {
        Place.FIRST: {"read_in.ffn.ffn.0.native_weight": "read_in/ffn/up/kernel"},
        Place.MIDDLE: {
            "pre_stitch.bias": "pre_stitch/bias",
            "ffn.layernorm.bias": "ffn/norm/bias",
        },
        Place.LAST: {"tokenizer.to_logits.bias": "pooling/head/bias"},
    }
    for params, place in zip(random_students().values(), PLACES, strict=True):
        state = tables.write(nac_names.student_table(SIZES, place), params)
        flat = traverse_util.flatten_dict(params, sep="/")
        names = dict(tensors[place])
        if place is not Place.LAST:
            names["post_stitch.weight"] = "post_stitch/kernel"
        for name, path in names.items():
            np.testing.assert_array_equal(state[name], np.transpose(flat[path]), err_msg=name)
