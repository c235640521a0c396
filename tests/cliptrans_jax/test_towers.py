"""The frozen encoders: what moves a feature and what must not, sizes, types, meshes."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from tiny import QUICK, fill

from cliptrans_jax import convert_towers, names
from cliptrans_jax.models import clip, resnet, xlmr
from common_jax.mesh import BATCH, MeshConfig, idle_rules, make_mesh, match_rules

SIZES = {"width": 16, "layers": 1, "heads": 2, "hidden": 24, "features": 8}
MCLIP = xlmr.MClipConfig(vocab=40, positions=12, **SIZES)
VISION = clip.ClipVisionConfig(image=8, patch=4, **SIZES)
TEXT = clip.ClipTextConfig(vocab=40, positions=10, **SIZES)
RESNET = resnet.ResNetConfig(image=32, layers=(1, 1, 1, 1), width=16, features=8)
TOWERS = {
    "mclip": (xlmr.MClip, MCLIP, xlmr.PARTITION_RULES),
    "vision": (clip.ClipVision, VISION, clip.PARTITION_RULES),
    "text": (clip.ClipText, TEXT, clip.PARTITION_RULES),
    "resnet": (resnet.ClipResNet, RESNET, resnet.PARTITION_RULES),
}
IDS = np.array([[0, 7, 9, 5, 39, 1, 1, 1], [0, 30, 39, 1, 1, 1, 1, 1]], np.int32)
MASK = (IDS != 1).astype(np.int32)


pytestmark = pytest.mark.usefixtures("little_optimised")


def build(name, dtype=jnp.float32):
    module, config, _ = TOWERS[name]
    return module(config, dtype)


def inputs(name, batch=2):
    """Arrays that a tower takes, the same ones at every call."""
    if name in ("vision", "resnet"):
        side = TOWERS[name][1].image
        images = np.random.default_rng(1).normal(size=(batch, side, side, 3))
        return (jnp.asarray(images, jnp.float32),)
    return tuple(jnp.asarray(np.resize(x, (batch, 8))) for x in (IDS, MASK))


def shapes_of(network, *arrays):
    return jax.eval_shape(network.init, jax.random.key(0), *arrays)["params"]


def random_params(name):
    """Random numbers in every place; those that are variances are positive."""
    params = traverse_util.flatten_dict(fill(build(name).init, *inputs(name))["params"], sep="/")
    params = {path: abs(x) + 0.5 if path.endswith("/var") else x for path, x in params.items()}
    return traverse_util.unflatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def params():
    return {name: random_params(name) for name in TOWERS}


@pytest.fixture(scope="module")
def plain(params):
    """Features in float32 of every tower's two inputs."""
    return {
        name: np.asarray(jax.jit(build(name).apply)({"params": params[name]}, *inputs(name)))
        for name in TOWERS
    }


def features(name, params, ids, mask, **options):
    mask = mask if mask is None else jnp.asarray(mask)
    return build(name).apply({"params": params[name]}, jnp.asarray(ids), mask, **options)


@pytest.mark.parametrize("name", TOWERS)
def test_features_leave_in_float32_and_are_nearly_the_same_in_bfloat16(name, params, plain):
    network, exact = build(name, jnp.bfloat16), plain[name]
    rough = np.asarray(jax.jit(network.apply)({"params": params[name]}, *inputs(name)))
    assert exact.shape == (2, 8)
    assert exact.dtype == rough.dtype == np.float32
    error = np.linalg.norm(exact - rough, axis=1) / np.linalg.norm(exact, axis=1)
    assert np.all(error > 0) and np.all(error < 0.05), error


def test_mclip_is_the_mean_of_what_is_heard(params):
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


def test_mclip_does_not_hear_what_the_mask_hides(params):
    mask = MASK.copy()
    mask[0, 2] = 0  # a hole inside the sentence
    changed = IDS.copy()
    changed[0, 2], changed[0, 5:], changed[1, 3:] = 21, 22, 23
    before = features("mclip", params, IDS, mask)
    np.testing.assert_allclose(features("mclip", params, changed, mask), before, atol=1e-6)
    assert np.max(np.abs(features("mclip", params, changed, MASK) - before)[0]) > 1e-3


def test_mclip_gives_a_row_without_tokens_the_mean_zero(params):
    found = features("mclip", params, IDS, np.zeros_like(MASK))
    bias = params["mclip"]["projection"]["bias"]
    np.testing.assert_array_equal(found, np.broadcast_to(bias, found.shape))


def test_positions_count_what_is_no_pad():
    ids = jnp.asarray([[0, 5, 1, 9, 2, 1], [1, 1, 0, 2, 1, 1]])
    want = [[2, 3, 1, 4, 5, 1], [1, 1, 2, 3, 1, 1]]
    np.testing.assert_array_equal(xlmr.position_ids(ids, 1), want)
    np.testing.assert_array_equal(xlmr.position_ids(ids - 1, 0), np.asarray(want) - 1)


def test_mclip_drops_out_in_training_alone(params, plain):
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return features("mclip", params, IDS, MASK, train=True, rngs=rngs)

    np.testing.assert_array_equal(train(0), train(0))
    assert np.max(np.abs(train(0) - plain["mclip"])) > 1e-3
    assert np.max(np.abs(train(0) - train(1))) > 1e-3
    never = xlmr.MClip(dataclasses.replace(MCLIP, dropout=0.0), jnp.float32)
    found = never.apply({"params": params["mclip"]}, *inputs("mclip"), train=True)
    np.testing.assert_allclose(found, plain["mclip"], rtol=1e-5, atol=1e-6)


def test_clip_pools_the_first_of_the_largest_ids_and_hears_nothing_behind_it(params):
    np.testing.assert_array_equal(clip.end_position(jnp.asarray(IDS)), [4, 2])
    before = features("text", params, IDS, MASK)
    padded = np.where(MASK == 1, IDS, 39)
    np.testing.assert_array_equal(clip.end_position(jnp.asarray(padded)), [4, 2])
    for ids, mask in ((IDS, None), (padded, MASK), (padded, None), (padded, MASK.astype(bool))):
        np.testing.assert_allclose(features("text", params, ids, mask), before, atol=1e-6)
    changed = IDS.copy()
    changed[:, 1] = 12
    assert np.all(np.max(np.abs(features("text", params, changed, MASK) - before), axis=1) > 1e-3)


def test_clip_does_not_hear_what_the_mask_hides(params):
    mask, changed = MASK.copy(), IDS.copy()
    mask[:, 1], changed[:, 1] = 0, 12
    before = features("text", params, IDS, mask)
    np.testing.assert_allclose(features("text", params, changed, mask), before, atol=1e-6)
    assert np.max(np.abs(features("text", params, IDS, MASK) - before)) > 1e-3


def test_clip_states_do_not_hear_what_follows(params):
    def states(ids):
        _, recorded = features("text", params, ids, None, mutable=["intermediates"])
        return np.asarray(recorded["intermediates"]["last_hidden"][0])

    changed = IDS.copy()
    changed[:, 3] = 17
    moved = np.max(np.abs(states(changed) - states(IDS)), axis=(0, 2)) > 1e-5
    np.testing.assert_array_equal(moved, [False] * 3 + [True] * 5)


def test_ids_outside_the_vocabulary_give_no_number(params):
    ids = IDS.copy()
    ids[0, 1] = 40
    for name in ("mclip", "text"):
        found = np.isnan(np.asarray(features(name, params, ids, MASK)))
        assert found[0].all() and not found[1].any(), name


@pytest.mark.parametrize("name", ["vision", "text"])
def test_gradients_reach_every_parameter_from_the_start(name):
    network, arrays = build(name), inputs(name)
    start = jax.jit(network.init)(jax.random.key(0), *arrays)["params"]

    def loss(params):
        return jnp.sum(jnp.square(network.apply({"params": params}, *arrays)))

    gradient = traverse_util.flatten_dict(
        jax.jit(jax.grad(loss), compiler_options=QUICK)(start), sep="/"
    )
    still = [path for path, x in gradient.items() if not np.any(np.asarray(x))]
    assert not still
    assert all(np.isfinite(x).all() for x in gradient.values())


@pytest.mark.parametrize("name", TOWERS)
def test_partition_rules_split_a_tower_over_eight_devices(name, params, plain):
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
    assert idle_rules(xlmr.PARTITION_RULES, shapes["mclip"]) == []
    assert idle_rules(clip.PARTITION_RULES, shapes["vision"], shapes["text"]) == []
    assert idle_rules(resnet.PARTITION_RULES, shapes["resnet"]) == []


@pytest.mark.parametrize(
    ("network", "rules", "count"),
    [
        (xlmr.MClip(xlmr.MClipConfig(), jnp.bfloat16), xlmr.PARTITION_RULES, 559_365_632),
        (clip.ClipVision(clip.ClipVisionConfig(), jnp.bfloat16), clip.PARTITION_RULES, 87_849_216),
        (clip.ClipText(clip.ClipTextConfig(), jnp.bfloat16), clip.PARTITION_RULES, 63_428_096),
        (clip.ClipText(clip.RN50X64_TEXT, jnp.bfloat16), clip.PARTITION_RULES, 202_877_952),
        (
            resnet.ClipResNet(resnet.ResNetConfig(), jnp.bfloat16),
            resnet.PARTITION_RULES,
            420_380_352,
        ),
    ],
    ids=["mclip", "vision", "text", "rn50x64_text", "rn50x64"],
)
def test_published_sizes_have_the_published_count_and_split(network, rules, count):
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
        (lambda: xlmr.MClipConfig(width=10, heads=4), r"^heads=4 must divide width=10"),
        (
            lambda: xlmr.MClipConfig(activation="tanh"),
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
        (lambda: shapes_of(build("mclip"), *(jnp.zeros((1, 11), jnp.int32),) * 2), "room for 10;"),
        (lambda: shapes_of(build("text"), jnp.zeros((1, 11), jnp.int32), None), "positions=10;"),
        (lambda: shapes_of(build("vision"), jnp.zeros((2, 8, 4, 3))), r"takes \(2, 8, 8, 3\)"),
        (lambda: shapes_of(build("resnet"), jnp.zeros((2, 64, 64, 3))), r"takes \(2, 32, 32, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sentences_as_long_as_the_table_are_taken():
    ids = jnp.zeros((1, 10), jnp.int32)
    for name in ("mclip", "text"):
        shapes_of(build(name), ids, ids)


def naive_convolution(x, kernel, stride):
    """A torch convolution of x [C, I, J] with kernel [out, C, side, side], place by place."""
    side = kernel.shape[-1]
    x = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2))
    rows, columns = ((size - side) // stride + 1 for size in x.shape[1:])
    out = np.empty((len(kernel), rows, columns))
    for i in range(rows):
        for j in range(columns):
            seen = x[:, i * stride : i * stride + side, j * stride : j * stride + side]
            out[:, i, j] = kernel.reshape(len(kernel), -1) @ seen.ravel()
    return out


def naive_average(x, side):
    channels, rows, columns = x.shape
    return x.reshape(channels, rows // side, side, columns // side, side).mean(axis=(2, 4))


def naive_resnet(tensors, image, config):
    """OpenAI's tower on one image [3, I, J], by OpenAI's names, in float64."""
    tensors = {name.removeprefix("visual."): np.float64(x) for name, x in tensors.items()}

    def normed(x, name):
        gain, bias, mean, var = (
            tensors[f"{name}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return gain * (x - mean) / np.sqrt(var + config.eps) + bias

    def conv_norm(x, conv, bn, stride=1):
        return normed(naive_convolution(x, tensors[f"{conv}.weight"], stride), bn)

    x = image
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = np.maximum(conv_norm(x, f"conv{i}", f"bn{i}", stride), 0)
    x = naive_average(x, 2)
    for stage, depth in enumerate(config.layers, 1):
        for i in range(depth):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            y = np.maximum(conv_norm(x, f"{name}.conv1", f"{name}.bn1"), 0)
            y = np.maximum(conv_norm(y, f"{name}.conv2", f"{name}.bn2"), 0)
            y = conv_norm(naive_average(y, stride), f"{name}.conv3", f"{name}.bn3")
            if i == 0:
                x = conv_norm(
                    naive_average(x, stride), f"{name}.downsample.0", f"{name}.downsample.1"
                )
            x = np.maximum(x + y, 0)
    places = x.reshape(len(x), -1).T
    tokens = np.concatenate([places.mean(axis=0, keepdims=True), places])
    tokens = tokens + tensors["attnpool.positional_embedding"]

    def projected(x, name):
        name = f"attnpool.{name}_proj"
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    query, keys, values = projected(tokens[0], "q"), projected(tokens, "k"), projected(tokens, "v")
    heads = []
    for i in range(0, len(query), 64):
        scores = keys[:, i : i + 64] @ query[i : i + 64] / 8
        weights = np.exp(scores - scores.max())
        heads.append(weights / weights.sum() @ values[:, i : i + 64])
    return projected(np.concatenate(heads), "c")


def test_resnet_computes_what_its_tensors_say():
    config = resnet.ResNetConfig(image=64, layers=(2, 1, 1, 2), width=4, features=6)
    network = resnet.ClipResNet(config, jnp.float32)
    images = np.random.default_rng(2).normal(size=(2, 64, 64, 3)).astype(np.float32)
    flat = traverse_util.flatten_dict(fill(network.init, jnp.asarray(images))["params"], sep="/")
    params = {path: abs(x) + 0.5 if path.endswith("/var") else x for path, x in flat.items()}
    params = traverse_util.unflatten_dict(params, sep="/")
    tensors = names.write(convert_towers.openai_resnet_table(config), params)
    found = jax.jit(network.apply)({"params": params}, jnp.asarray(images))
    want = [naive_resnet(tensors, image.transpose(2, 0, 1), config) for image in images]
    assert np.std(want) > 1e-2
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.max(np.abs(want)))
