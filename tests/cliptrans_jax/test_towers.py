"""The frozen towers: what their features depend on, sizes, dtypes, meshes."""

import dataclasses
import functools
import math

import jax
import naive_cliptrans as naive
import numpy as np
import pytest
from dropouts import dropouts
from flax import traverse_util
from jax import numpy as jnp
from meshes import idle_rules
from tiny import fill

from cliptrans_jax.towers import clip, clip_names, mclip, mclip_names, resnet, resnet_names
from cliptrans_jax.towers.labse import LabseConfig
from common_jax.mesh import BATCH, MeshConfig, make_mesh, match_rules
from common_jax.nn.mlp import ACTIVATIONS
from common_jax.weights import table as tables

# Epsilons and pads all differ from the defaults.
SIZES = {"width": 16, "layers": 1, "heads": 2, "hidden": 24, "features": 8, "eps": 1e-4}
MCLIP = mclip.MClipConfig(vocab=40, positions=16, pad=5, types=2, **SIZES)
VISION = clip.ClipVisionConfig(image=8, patch=4, **SIZES)
TEXT = clip.ClipTextConfig(vocab=40, positions=10, **SIZES)
RN50X64_TEXT = clip.ClipTextConfig(width=1024, heads=16, hidden=4096, features=1024)
RESNET = resnet.ResNetConfig(image=32, layers=(1, 1, 1, 1), width=16, features=8)
TOWERS = {
    "mclip": (mclip.MClip, MCLIP, mclip.PARTITION_RULES),
    "vision": (clip.ClipVision, VISION, clip.PARTITION_RULES),
    "text": (clip.ClipText, TEXT, clip.PARTITION_RULES),
    "resnet": (resnet.ClipResNet, RESNET, resnet.PARTITION_RULES),
}
IDS = np.array([[0, 7, 9, 5, 39, 1, 1, 1], [0, 30, 39, 1, 1, 1, 1, 1]], np.int32)
MASK = (IDS != 1).astype(np.int32)


def build(name, dtype=jnp.float32):
    module, config, _ = TOWERS[name]
    return module(config, dtype)


def inputs(name, batch=2):
    """A tower's input arrays, the same at every call."""
    if name in ("vision", "resnet"):
        side = TOWERS[name][1].image
        images = np.random.default_rng(1).normal(size=(batch, side, side, 3))
        return (jnp.asarray(images, jnp.float32),)
    return tuple(jnp.asarray(np.resize(x, (batch, 8))) for x in (IDS, MASK))


@functools.cache
def fresh(name):
    """Initial parameters."""
    key = jax.random.key(0, impl="rbg")  # quick to compile
    return jax.jit(build(name).init)(key, *inputs(name))["params"]


def shapes_of(network, *arrays):
    return jax.eval_shape(network.init, jax.random.key(0), *arrays)["params"]


def random_params(name):
    """Random numbers everywhere; variances are positive."""
    params = traverse_util.flatten_dict(fill(build(name).init, *inputs(name))["params"], sep="/")
    params = {path: abs(x) + 0.5 if path.endswith("/var") else x for path, x in params.items()}
    return traverse_util.unflatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def params():
    return {name: random_params(name) for name in TOWERS}


@functools.cache
def program(name):
    """(parameters, *inputs) -> features in float32."""
    return jax.jit(lambda params, *arrays: build(name).apply({"params": params}, *arrays))


@pytest.fixture(scope="module")
def plain(params):
    """Features in float32 of every tower's two inputs."""
    return {name: np.asarray(program(name)(params[name], *inputs(name))) for name in TOWERS}


def features(name, params, ids, mask, **options):
    mask = mask if mask is None else jnp.asarray(mask)
    return build(name).apply({"params": params[name]}, jnp.asarray(ids), mask, **options)


@pytest.mark.parametrize("name", TOWERS)
def test_features_are_float32_and_nearly_equal_in_bfloat16(name, params, plain):
    network, exact = build(name, jnp.bfloat16), plain[name]
    rough = np.asarray(jax.jit(network.apply)({"params": params[name]}, *inputs(name)))
    assert exact.shape == (2, 8)
    assert exact.dtype == rough.dtype == np.float32
    error = np.linalg.norm(exact - rough, axis=1) / np.linalg.norm(exact, axis=1)
    assert np.all(error > 0) and np.all(error < 0.05), error


NAIVE = {  # tower -> (table of names, feature of one example)
    "mclip": (
        mclip_names.table(MCLIP),
        functools.partial(naive.mclip, heads=MCLIP.heads, pad=MCLIP.pad),
    ),
    "vision": (
        clip_names.vision_table(VISION),
        functools.partial(naive.clip_vision, heads=VISION.heads),
    ),
    "text": (
        clip_names.text_table(TEXT),
        functools.partial(naive.clip_text, heads=TEXT.heads),
    ),
}


@pytest.mark.parametrize("size", [1.0, 0.02])  # small enough that every epsilon shows
@pytest.mark.parametrize("name", NAIVE)
def test_tower_matches_a_naive_implementation(name, size, params):
    shrunk = jax.tree.map(lambda x: size * x, params[name])
    found = np.asarray(program(name)(shrunk, *inputs(name)))
    table, feature = NAIVE[name]
    weights = naive.Weights(tables.write(table, shrunk), eps=SIZES["eps"])
    if name == "vision":
        examples = [(image,) for image in np.asarray(inputs(name)[0]).transpose(0, 3, 1, 2)]
    else:
        examples = zip(IDS, MASK == 1, strict=True)
    want = np.array([feature(weights, *example) for example in examples])
    scale = np.abs(want - want.mean(axis=0)).max()  # the scale on which examples differ
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-3 * scale)


def test_activations_match_naive_ones(params):
    x = np.linspace(-3, 3, 13)
    for name, want in (("gelu", naive.gelu), ("quick_gelu", naive.quick_gelu)):
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), want(x), atol=1e-6)
    assert clip.ACTIVATIONS == ("gelu", "quick_gelu") and mclip.ACTIVATIONS == ("gelu",)
    network = clip.ClipText(dataclasses.replace(TEXT, activation="gelu"), jnp.float32)
    found = jax.jit(network.apply)({"params": params["text"]}, *inputs("text"))
    weights = naive.Weights(tables.write(NAIVE["text"][0], params["text"]), eps=SIZES["eps"])
    for row, (ids, mask) in enumerate(zip(IDS, MASK == 1, strict=True)):
        want = naive.clip_text(weights, ids, mask, heads=2, activation=naive.gelu)
        np.testing.assert_allclose(found[row], want, rtol=1e-4, atol=1e-5)


def test_mclip_applies_dropout_to_embeddings_and_branches(params):
    """Without them, a block is the norm of a norm."""
    network = mclip.MClip(dataclasses.replace(MCLIP, dropout=0.3), jnp.float32)

    def last(zero):
        with dropouts(zero) as calls:
            apply = functools.partial(network.apply, train=True, mutable=["intermediates"])
            _, recorded = jax.jit(apply)({"params": params["mclip"]}, *inputs("mclip"))
        assert [rate for _, rate, _ in calls] == [0.3] * 3
        assert [path[0] for path, _, _ in calls] == ["embeddings", "layer_0", "layer_0"]
        return recorded["intermediates"]["last_hidden"][0]

    weights = naive.Weights(tables.write(NAIVE["mclip"][0], params["mclip"]), eps=SIZES["eps"])
    block = weights.below("transformer.encoder.layer.0.")
    for zero, x in (
        (lambda path: True, np.zeros((2, 8, 16))),
        (lambda path: path[0] == "layer_0", embedded(weights)),
    ):
        want = block.norm("output.LayerNorm", block.norm("attention.output.LayerNorm", x))
        np.testing.assert_allclose(last(zero), want, rtol=1e-4, atol=1e-5)


def embedded(weights):
    """The output of M-CLIP's embeddings outside training."""
    return np.stack([naive.mclip_embeddings(weights, ids, MCLIP.pad) for ids in IDS])


@pytest.mark.parametrize("name", ["mclip", "vision", "text"])
def test_towers_have_the_published_initialisation(name):
    """Matrices and tables are normal with deviation 0.02, biases 0 and gains 1."""
    for path, leaf in traverse_util.flatten_dict(fresh(name), sep="/").items():
        if path.endswith(("bias", "scale")):
            assert np.all(np.asarray(leaf) == float(path.endswith("scale"))), path
        elif leaf.size >= 100:
            assert abs(np.std(leaf) / 0.02 - 1) < 0.2, path
            assert abs(np.mean(leaf)) < 0.005, path


def test_defaults_are_the_published_models():
    shared = {"eps": 1e-5, "features": 512, "attention": "auto"}
    large = {"width": 1024, "layers": 24, "heads": 16, "hidden": 4096}
    ids = {"vocab": 250002, "positions": 514, "types": 1, "pad": 1}
    xlmr = large | ids | shared | {"dropout": 0.1, "activation": "gelu", "kind": "mclip"}
    assert dataclasses.asdict(mclip.MClipConfig()) == xlmr
    shared |= {"layers": 12, "activation": "quick_gelu"}
    vision = {"image": 224, "patch": 32, "width": 768, "heads": 12, "hidden": 3072}
    assert dataclasses.asdict(clip.ClipVisionConfig()) == shared | vision | {"kind": "clip_vision"}
    text = {"vocab": 49408, "positions": 77, "width": 512, "heads": 8, "hidden": 2048}
    assert dataclasses.asdict(clip.ClipTextConfig()) == shared | text
    rn50x64 = {"image": 448, "layers": (3, 15, 36, 10), "width": 128, "features": 1024, "eps": 1e-5}
    assert dataclasses.asdict(resnet.ResNetConfig()) == rn50x64
    assert resnet.ResNetConfig().heads == 64
    tokens = (clip.ClipVisionConfig().tokens, resnet.ResNetConfig().tokens)
    assert tokens == (50, 197)


def test_batch_norm_by_hand():
    network = resnet.FrozenBatchNorm(0.5, jnp.float32)
    stored = {"scale": [3.0, 1.0], "bias": [1.0, -1.0], "mean": [2.0, 0.0], "var": [0.75, 3.5]}
    params = {name: jnp.asarray(x) for name, x in stored.items()}
    x = jnp.asarray([[[[4.0, 6.0]]]])
    found = network.apply({"params": params}, x)
    np.testing.assert_allclose(found[0, 0, 0], [3 * 2 / 1.25**0.5 + 1, 6 / 2 - 1], rtol=1e-6)


def test_mclip_averages_the_visible_tokens(params):
    mask = MASK.copy()
    mask[0, 2] = 0
    found, recorded = features("mclip", params, IDS, mask, mutable=["intermediates"])
    hidden = np.asarray(recorded["intermediates"]["last_hidden"][0])
    assert hidden.shape == (2, 8, 16)
    layer = params["mclip"]["projection"]
    for row in range(2):
        mean = hidden[row][mask[row] == 1].mean(axis=0)
        want = mean @ layer["kernel"] + layer["bias"]
        np.testing.assert_allclose(found[row], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found, features("mclip", params, IDS, mask.astype(bool)))


def test_mclip_ignores_masked_tokens(params):
    mask = MASK.copy()
    mask[0, 2] = 0  # a hole inside the sentence
    changed = IDS.copy()
    changed[0, 2], changed[0, 5:], changed[1, 3:] = 21, 22, 23
    before = features("mclip", params, IDS, mask)
    np.testing.assert_allclose(features("mclip", params, changed, mask), before, atol=1e-6)
    assert np.max(np.abs(features("mclip", params, changed, MASK) - before)[0]) > 1e-3


def test_mclip_mean_of_a_row_without_tokens_is_zero(params):
    found = features("mclip", params, IDS, np.zeros_like(MASK))
    bias = params["mclip"]["projection"]["bias"]
    np.testing.assert_array_equal(found, np.broadcast_to(bias, found.shape))


def test_positions_count_non_pad_tokens():
    ids = jnp.asarray([[0, 5, 1, 9, 2, 1], [1, 1, 0, 2, 1, 1]])
    want = [[2, 3, 1, 4, 5, 1], [1, 1, 2, 3, 1, 1]]
    np.testing.assert_array_equal(mclip.position_ids(ids, 1), want)
    np.testing.assert_array_equal(mclip.position_ids(ids - 1, 0), np.asarray(want) - 1)
    np.testing.assert_array_equal(MCLIP.places(ids), mclip.position_ids(ids, MCLIP.pad))
    np.testing.assert_array_equal(LabseConfig().places(ids), [[0, 1, 2, 3, 4, 5]] * 2)
    assert LabseConfig().longest == 512


def test_mclip_has_dropout_only_in_training(params, plain):
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return features("mclip", params, IDS, MASK, train=True, rngs=rngs)

    np.testing.assert_array_equal(train(0), train(0))
    assert np.max(np.abs(train(0) - plain["mclip"])) > 1e-3
    assert np.max(np.abs(train(0) - train(1))) > 1e-3
    never = mclip.MClip(dataclasses.replace(MCLIP, dropout=0.0), jnp.float32)
    found = never.apply({"params": params["mclip"]}, *inputs("mclip"), train=True)
    np.testing.assert_allclose(found, plain["mclip"], rtol=1e-5, atol=1e-6)


def test_clip_pools_the_first_end_token_and_ignores_the_rest(params):
    np.testing.assert_array_equal(clip.end_position(jnp.asarray(IDS)), [4, 2])
    before = features("text", params, IDS, MASK)
    padded = np.where(MASK == 1, IDS, 39)
    np.testing.assert_array_equal(clip.end_position(jnp.asarray(padded)), [4, 2])
    for ids, mask in ((IDS, None), (padded, MASK), (padded, None), (padded, MASK.astype(bool))):
        np.testing.assert_allclose(features("text", params, ids, mask), before, atol=1e-6)
    changed = IDS.copy()
    changed[:, 1] = 12
    assert np.all(np.max(np.abs(features("text", params, changed, MASK) - before), axis=1) > 1e-3)


def test_clip_ignores_masked_tokens(params):
    mask, changed = MASK.copy(), IDS.copy()
    mask[:, 1], changed[:, 1] = 0, 12
    before = features("text", params, IDS, mask)
    np.testing.assert_allclose(features("text", params, changed, mask), before, atol=1e-6)
    assert np.max(np.abs(features("text", params, IDS, MASK) - before)) > 1e-3


def test_clip_is_causal(params):
    def states(ids):
        _, recorded = features("text", params, ids, None, mutable=["intermediates"])
        return np.asarray(recorded["intermediates"]["last_hidden"][0])

    changed = IDS.copy()
    changed[:, 3] = 17
    moved = np.max(np.abs(states(changed) - states(IDS)), axis=(0, 2)) > 1e-5
    np.testing.assert_array_equal(moved, [False] * 3 + [True] * 5)


def test_ids_outside_the_vocabulary_give_nan(params):
    ids = IDS.copy()
    ids[0, 1] = 40
    for name in ("mclip", "text"):
        found = np.isnan(np.asarray(features(name, params, ids, MASK)))
        assert found[0].all() and not found[1].any(), name


@pytest.mark.parametrize("name", ["vision", "text"])
def test_gradients_reach_every_parameter_from_the_start(name):
    network, arrays, start = build(name), inputs(name), fresh(name)

    def loss(params):
        return jnp.sum(jnp.square(network.apply({"params": params}, *arrays)))

    gradient = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(start), sep="/")
    still = [path for path, x in gradient.items() if not np.any(np.asarray(x))]
    assert not still
    assert all(np.isfinite(x).all() for x in gradient.values())


@pytest.mark.parametrize("name", TOWERS)
def test_partition_rules_shard_a_tower_over_eight_devices(name, params, plain):
    network, rules, arrays = build(name), TOWERS[name][2], inputs(name, batch=8)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        shardings = match_rules(rules, params[name], mesh)
        placed = jax.device_put(params[name], shardings)
        assert any("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(placed))
        split = jax.device_put(arrays, jax.NamedSharding(mesh, BATCH))
        found = jax.jit(network.apply)({"params": placed}, *split)
        assert found.sharding.spec[0] is not None
    np.testing.assert_allclose(found[:2], plain[name], rtol=1e-4, atol=1e-5)


def test_no_partition_rule_is_idle():
    shapes = {name: shapes_of(build(name), *inputs(name)) for name in TOWERS}
    assert idle_rules(mclip.PARTITION_RULES, shapes["mclip"]) == []
    assert idle_rules(clip.PARTITION_RULES, shapes["vision"], shapes["text"]) == []
    assert idle_rules(resnet.PARTITION_RULES, shapes["resnet"]) == []


@pytest.mark.parametrize(
    ("network", "rules", "count"),
    [
        (mclip.MClip(mclip.MClipConfig(), jnp.bfloat16), mclip.PARTITION_RULES, 559_365_632),
        (clip.ClipVision(clip.ClipVisionConfig(), jnp.bfloat16), clip.PARTITION_RULES, 87_849_216),
        (clip.ClipText(clip.ClipTextConfig(), jnp.bfloat16), clip.PARTITION_RULES, 63_428_096),
        (clip.ClipText(RN50X64_TEXT, jnp.bfloat16), clip.PARTITION_RULES, 202_877_952),
        (
            resnet.ClipResNet(resnet.ResNetConfig(), jnp.bfloat16),
            resnet.PARTITION_RULES,
            420_380_352,
        ),
    ],
    ids=["mclip", "vision", "text", "rn50x64_text", "rn50x64"],
)
def test_published_sizes_have_the_published_count_and_can_be_sharded(network, rules, count):
    arrays = (jnp.zeros((1, 4), jnp.int32),) * 2
    if isinstance(network, clip.ClipVision | resnet.ClipResNet):
        arrays = (jnp.zeros((1, network.config.image, network.config.image, 3)),)
    shapes = shapes_of(network, *arrays)
    match_rules(rules, shapes, make_mesh(MeshConfig(data=1, fsdp=8)))
    flat = traverse_util.flatten_dict(shapes, sep="/")
    statistics = [path for path in flat if path.endswith(("/mean", "/var"))]
    assert sum(math.prod(flat[path].shape) for path in flat.keys() - set(statistics)) == count
    assert all(leaf.dtype == jnp.float32 for leaf in flat.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mclip.MClipConfig(width=10, heads=4), r"^heads=4 must divide width=10"),
        (
            lambda: mclip.MClipConfig(activation="tanh"),
            r"^activation='tanh' must be one of \['gelu'\]",
        ),
        (lambda: clip.ClipTextConfig(width=10, heads=4), r"^heads=4 must divide width=10"),
        (
            lambda: clip.ClipVisionConfig(activation="relu"),
            r"^activation='relu' must be .*'gelu', 'quick_gelu'",
        ),
        (lambda: clip.ClipVisionConfig(patch=30), r"^patch=30 must divide image=224"),
        (lambda: resnet.ResNetConfig(image=40), "image=40 must be a multiple of 32"),
        (lambda: resnet.ResNetConfig(layers=(1, 2)), r"layers=\(1, 2\) must be four numbers"),
        (lambda: resnet.ResNetConfig(width=3), "width=3 must be even"),
        (lambda: shapes_of(build("mclip"), *(jnp.zeros((1, 11), jnp.int32),) * 2), "allows 10;"),
        (lambda: shapes_of(build("text"), jnp.zeros((1, 11), jnp.int32), None), "positions=10;"),
        (lambda: shapes_of(build("vision"), jnp.zeros((2, 8, 4, 3))), r"takes \(2, 8, 8, 3\)"),
        (lambda: shapes_of(build("resnet"), jnp.zeros((2, 64, 64, 3))), r"takes \(2, 32, 32, 3\)"),
    ],
)
def test_invalid_towers_and_inputs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sentences_may_fill_the_position_table():
    ids = jnp.zeros((1, 10), jnp.int32)
    for name in ("mclip", "text"):
        assert shapes_of(build(name), ids, ids)["projection"]["kernel"].shape == (16, 8)


def test_resnet_matches_a_naive_implementation():
    config = resnet.ResNetConfig(image=64, layers=(2, 1, 1, 2), width=4, features=6, eps=0.1)
    network = resnet.ClipResNet(config, jnp.float32)
    images = np.random.default_rng(2).normal(size=(2, 64, 64, 3)).astype(np.float32)
    flat = traverse_util.flatten_dict(fill(network.init, jnp.asarray(images))["params"], sep="/")
    params = {path: abs(x) + 0.5 if path.endswith("/var") else x for path, x in flat.items()}
    params = traverse_util.unflatten_dict(params, sep="/")
    tensors = tables.write(resnet_names.table(config), params)
    found = jax.jit(network.apply)({"params": params}, jnp.asarray(images))
    weights = naive.Weights(tensors, eps=config.eps)
    want = [naive.resnet(weights, image.transpose(2, 0, 1)) for image in images]
    assert np.std(want) > 1e-2
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.max(np.abs(want)))
