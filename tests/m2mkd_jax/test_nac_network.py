"""Whole NACs and their students: what each switch needs, sharing, wiring, what is drawn when.

Nearly all of the time goes into compiling. So networks run op by op, to share compiled ops, and
their parameters are drawn in numpy.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from meshes import idle_rules
from tiny import fill

from common_jax.config import freeze
from common_jax.mesh import MeshConfig, make_mesh, match_rules
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac import model
from m2mkd_jax.nac.kernel import KernelConfig
from m2mkd_jax.nac.layers import LinearConfig
from m2mkd_jax.nac.tokenizer import TokenizerConfig

SIZES = model.NacConfig(
    tokenizer=TokenizerConfig(preset="atto", width=16, grid_width=8),
    inputs=4,
    mediators=6,
    outputs=3,
    iterations=2,
    width=24,
    code_width=20,
    signature_width=12,
    heads=2,
    head_width=8,
)
INTERFACE = Interface(16, 3, 7)
STREAMS = ("code", "kernel", "drop_path", "state", "pooling")


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return normal(3, 16, 16, 3)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def rngs(seed: int = 0) -> dict[str, jax.Array]:
    return {name: jax.random.key(seed + i) for i, name in enumerate(STREAMS)}


def replace(**changes) -> model.NacConfig:
    return dataclasses.replace(SIZES, **changes)


def build(**changes):
    network = model.build(replace(**changes), INTERFACE, drop_path=0.1)
    return network, fill(network.init)


@functools.cache
def plain():
    """The network with SIZES, and its parameters."""
    return build()


def run(network, params, images, **settings):
    return network.apply(params, images, **settings)[0]


def trained(network, params, images):
    """Logits in training, from a program compiled as a whole."""
    forward = lambda params: run(network, params, images, train=True, rngs=rngs())  # noqa: E731
    return jax.jit(forward)(params)


@pytest.mark.parametrize(
    ("name", "parameters"), [("tinyimagenet", 26_703_342), ("imagenet", 37_589_294)]
)
def test_published_sizes(name, parameters):
    config, image_size, labels = model.preset(name)
    network = model.build(config, Interface(image_size, 3, labels))
    leaves = jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0)))
    assert sum(leaf.size for leaf in leaves) == parameters
    assert len(leaves) == 362


FIXED = KernelConfig(truncation_kind="masked", stochastic=False, learnable_bandwidth=False)

# Overrides, parameters that exist with them, parameters that do not.
VARIANTS = {
    "shared MLPs, learned states": (
        {
            "share_ffns": True,
            "share_norm": False,
            "read_in_scale": None,
            "seeding": "learned",
            "identical_codes": True,
            "pooling": "gumbel_hard",
        },
        ("graph/output/states", "stage_2/attention/sender_norm"),
        "stage_2/ffn|stage_0/read_in/attention/layer_scale|seeder",
    ),
    "projection, first slot": (
        {
            "read_in": "projection",
            "linear": LinearConfig("weight_modulated"),
            "mask": False,
            "share_codes": False,
            "seeding": "mean",
            "pooling": "first_slot",
            "read_out_head": True,
            "read_out_head_norm": False,
        },
        ("projection/code_bias", "code_head/linear/kernel", "seeder/mean", "attention/bandwidth"),
        "read_in/attention|gain|log_variance|pooling|code_head/norm",
    ),
    "inputs as mediators": (
        {
            "inputs_as_mediators": True,
            "mediators": 4,
            "layer_scale": None,
            "geglu": False,
            "read_out_residual": True,
        },
        ("stage_0/read_in/attention/layer_scale",),
        "stage_[123]/.*/layer_scale",
    ),
    "plain layers": (
        {
            "linear": LinearConfig("plain"),
            "qkv_bias": True,
            "kernel": FIXED,
            "pooling": "softmax",
            "read_in_residual": False,
            "code_noise": 0.0,
        },
        ("stage_1/attention/query/bias", "stage_3/attention/bandwidth"),
        "code_kernel|gain|stage_[12]/attention/bandwidth",
    ),
    "iterations that differ": (
        {
            "layerwise": {"ffn_factor": (1.0, 0.5), "kernel/truncation": (None, 0.5)},
            "linear": LinearConfig(dropout=0.3, learnable_gain=False),
            "seeding": "code",
            "code_width": 24,
            "read_in_heads": 1,
            "read_out_heads": 3,
            "tokenizer": TokenizerConfig("nano", stages=3, width=16, grid_width=8),
        },
        ("tokenizer/block_2_0/depthwise", "stage_1/ffn/up/code_kernel"),
        r"gain|seeder|block_\d_1",
    ),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants_train_on_the_parameters_they_need(name, images):
    changes, there, absent = VARIANTS[name]
    network, params = build(**changes)
    paths = list(traverse_util.flatten_dict(params, sep="/"))
    assert all(any(part in path for path in paths) for part in there)
    assert not [path for path in paths if re.search(absent, path)]
    logits = trained(network, params, images)
    assert logits.shape == (3, 7)
    assert np.all(np.isfinite(logits))


@pytest.mark.parametrize(
    ("to_mediators", "to_outputs"),
    [("always", True), ("always", False), ("first", True), ("first", False), ("never", True)],
)
def test_wiring_decides_which_latents_see_the_images(to_mediators, to_outputs, images):
    network, params = build(inputs_to_mediators=to_mediators, inputs_to_outputs=to_outputs)
    logits, recorded = network.apply(params, images, record=("states",))
    differ = {name: not np.allclose(*x[:2]) for name, x in recorded["states"].items()}
    assert differ == {"input": True, "mediator": to_mediators != "never"}
    assert not np.allclose(*logits[:2])


def test_computing_input_keys_once_changes_nothing(images):
    shared, params = build(share_propagators=True, code_noise=0.0)
    assert sorted(params) == ["graph", "stage_0", "stage_1", "stage_3"]
    apart = model.build(replace(code_noise=0.0), INTERFACE, drop_path=0.1)
    spread = {**params, "stage_2": params["stage_1"]}
    for draws in ({}, {"train": True, "rngs": rngs()}):
        once = run(shared, params, images, **draws)
        np.testing.assert_allclose(once, run(apart, spread, images, **draws), atol=2e-6)


def test_shared_ffns_are_those_of_the_first_iteration(images):
    network, params = build(share_ffns=True)
    assert [name for name in params if "ffn" in params[name]] == ["stage_1", "stage_3"]
    spread = params | {"stage_2": params["stage_2"] | {"ffn": params["stage_1"]["ffn"]}}
    apart = run(plain()[0], spread, images)
    np.testing.assert_allclose(run(network, params, images), apart, atol=2e-6)


def test_remat_changes_nothing_and_is_per_iteration(images):
    network, params = plain()
    again = dataclasses.replace(network, remat=True)
    logits = trained(network, params, images)
    np.testing.assert_allclose(trained(again, params, images), logits, rtol=1e-5, atol=1e-6)
    for one, count in ((network, 0), (again, 2)):
        loss = lambda params, one=one: jnp.sum(run(one, params, images))  # noqa: E731
        equations = jax.make_jaxpr(jax.grad(loss))(params).eqns
        assert (
            sum(
                "checkpoint" in equation.primitive.name or "remat" in equation.primitive.name
                for equation in equations
            )
            == count
        )


def test_evaluation_draws_only_with_keys(images):
    network, params = plain()
    mean = run(network, params, images)
    np.testing.assert_array_equal(mean, run(network, params, images))
    one, two = (run(network, params, images, rngs=rngs(seed)) for seed in (0, 9))
    assert not np.allclose(one, two)
    assert not np.allclose(one, mean)
    few = {name: rngs()[name] for name in ("state", "pooling")}
    np.testing.assert_array_equal(one, run(network, params, images, rngs=few))


def test_evaluation_uses_kernel_sample_or_threshold(images):
    _, params = plain()
    logits = {}
    for name in ("kernel", "sample", "threshold"):
        network = model.build(replace(kernel=KernelConfig(evaluation=name)), INTERFACE)
        one, two = ({"kernel": jax.random.key(seed)} for seed in (0, 1))
        logits[name] = run(network, params, images, rngs=one)
        same = np.array_equal(logits[name], run(network, params, images, rngs=two))
        assert same == (name != "sample")
    assert not np.allclose(logits["kernel"], logits["threshold"])


def test_training_without_keys_is_refused(images):
    network, params = plain()
    with pytest.raises(Exception, match="code"):
        network.apply(params, images, train=True)


def test_given_noise_is_used(images):
    network, params = plain()
    mean = run(network, params, images)
    given = {"graph": {"input_states": jnp.zeros((3, 4, 24))}}
    np.testing.assert_allclose(run(network, params, images, noise=given), mean, atol=1e-6)
    given = {"graph": {"input_states": jnp.ones((3, 4, 24))}}
    assert not np.allclose(run(network, params, images, noise=given), mean, atol=1e-3)
    with pytest.raises(ValueError, match=r"noise input_states has shape \(3, 5, 24\)"):
        network.apply(params, images, noise={"graph": {"input_states": jnp.zeros((3, 5, 24))}})


def test_images_of_another_size_are_refused(images):
    network, params = plain()
    with pytest.raises(ValueError, match=r"config\.data\.image_size"):
        network.apply(params, images[:, :8])


def test_given_signatures_are_the_initial_ones():
    network, given = plain()[0], normal(6, 12, seed=5)
    draw = jax.jit(lambda key: network.init(key, signatures={"mediator": given})["graph"])
    graph = draw(jax.random.key(0))
    np.testing.assert_array_equal(graph["mediator"]["signatures"], given)
    assert graph["input"]["signatures"].shape == (4, 12)
    assert np.std(graph["input"]["signatures"]) > 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pooling": "gumble"}, r"^pooling='gumble' must be one of"),
        ({"pooling": "first_slot"}, r"^pooling='first_slot' .* read_out_head=True"),
        ({"inputs_as_mediators": True}, r"inputs=4 as mediators=6"),
        ({"layerwise": {"ffn_factor": (1.0,)}}, r"layerwise\.ffn_factor=\(1\.0,\) must have"),
        ({"layerwise": {"width": (24, 48)}}, r"^layerwise\.width=\(24, 48\) .* set width$"),
        ({"layerwise": {"code_width": (20, 40)}}, r"^layerwise\.code_width=\(20, 40\) must"),
        ({"layerwise": {"attention": ("xla", "flash")}}, r"^layerwise\.attention\[1\]='flash'"),
        (
            {"layerwise": {"ffn_factor": (1.0, 2.0)}, "share_ffns": True},
            r"^layerwise=.* different shapes, but share_ffns=True",
        ),
        (
            {"inputs_to_mediators": "never", "inputs_to_outputs": False},
            r"^inputs_to_mediators='never' and inputs_to_outputs=False hide the image",
        ),
        ({"seeding": "codes"}, r"^seeding='codes'"),
        ({"students": "cifar"}, r"^students='cifar'"),
    ],
)
def test_invalid_settings_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(**changes)


def test_unknown_layerwise_field_is_named():
    said = r"^layerwise\.kernel/truncate\[0\]=1\.0: KernelConfig has no field 'truncate'"
    with pytest.raises(ValueError, match=said):
        replace(layerwise={"kernel/truncate": (1.0, 1.0)})


def test_a_layerwise_value_out_of_range_is_named_with_its_iteration():
    layerwise = {"layerwise": {"ffn_factor": (1.0, -1.0)}, "iterations": 2}
    said = r"^config\.model\.layerwise\.ffn_factor\[1\]=-1\.0: ffn_factor=-1\.0 must be positive"
    with pytest.raises(ValueError, match=said):
        freeze(model.NacConfig, layerwise, "config.model")


# Devices.


def test_no_partition_rule_is_idle():
    every = {"linear": LinearConfig("weight_modulated"), "read_in": "projection", "qkv_bias": True}
    configs = (
        replace(read_out_head=True),
        replace(seeding="learned", tokenizer=TokenizerConfig("nano", width=16), **every),
    )
    interface = Interface(16, 3, 8)  # the head, which precedes pooling, is split along labels
    networks = [model.build(config, interface) for config in configs]
    networks.append(model.build_students(SIZES, INTERFACE, meta_width=16, meta_tokens=5, seed=0))
    shapes = [jax.eval_shape(network.init, jax.random.key(0)) for network in networks]
    assert idle_rules(model.PARTITION_RULES, *shapes) == []
    for tree in shapes:
        match_rules(model.PARTITION_RULES, tree, make_mesh(MeshConfig(data=2, fsdp=4)))


def test_activations_are_sharded():
    network, params = plain()

    def forward(params, images):
        return network.apply(params, images, record=("states",))

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        run = jax.jit(forward)
        logits, recorded = run(params, np.zeros((16, 16, 16, 3), np.float32))
    arrays = {"logits": logits} | recorded["states"]
    shapes = {name: array.sharding.shard_shape(array.shape) for name, array in arrays.items()}
    assert shapes == {"logits": (2, 7), "input": (2, 4, 24), "mediator": (2, 6, 24)}


# Students.


def test_student_codes_and_states_are_the_same_in_every_call():
    students = model.build_students(SIZES, INTERFACE, meta_width=16, meta_tokens=5, seed=3)
    params = fill(functools.partial(students.init, only=(3,)))
    last = functools.partial(students.apply, params, start=3, stop=4)
    tokens = normal(3, 5, 16)
    one = last(tokens)[0]
    np.testing.assert_array_equal(one, last(tokens)[0])
    other = model.build_students(SIZES, INTERFACE, meta_width=16, meta_tokens=5, seed=4)
    assert not np.allclose(one, other.apply(params, tokens, start=3, stop=4)[0])
    # Every position in a batch has its own state, regardless of the other positions.
    same = last(jnp.broadcast_to(tokens[0], tokens.shape))[0]
    np.testing.assert_allclose(same[0], one[0], atol=1e-6)
    assert not np.allclose(same[1], same[0])


def test_read_in_student_outputs_one_token():
    students = model.build_students(SIZES, INTERFACE, meta_width=16, meta_tokens=5, seed=3)
    params = fill(functools.partial(students.init, only=(0,)))
    assert students.apply(params, normal(3, 16, 16, 3), stop=1)[0].shape == (3, 1, 16)


@pytest.mark.parametrize(("legacy", "first"), [(False, 0.1), (True, 1e-6)])
def test_read_in_student_scale_starts_as_published_or_legacy(legacy, first):
    config = replace(legacy_read_in_scale=legacy)
    students = model.build_students(config, INTERFACE, meta_width=16, meta_tokens=5, seed=3)
    draw = jax.jit(lambda key: students.init(key, only=(0,))["stage_0"]["read_in"]["ffn"])
    scale = np.asarray(draw(jax.random.key(0))["layer_scale"])
    assert np.all(scale == np.float32(first))
