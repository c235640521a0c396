"""ViTs with registers, layer scale, no class token and other pooling, worked out by hand."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from meshes import split_mesh
from scipy.special import erf, expit, softmax
from tiny import SIZES, count_parameters, fill
from vit_variants import EPS, IMAGES, VARIANTS, apply, build, images, shapes_of, sizes_of

from common_jax.config import FieldError
from common_jax.mesh import match_rules
from m2mkd_jax.models import encoder, vit, vmoe
from m2mkd_jax.models.positions import resize_positions, resize_weights, resizer

# Parameters that a variant adds or removes compared with the plain ViT (paths without the stage),
# and those whose shape changes; width 16, heads 2 of 8, hidden 32.
POOL = {
    "pool/probe": (1, 1, 16),
    "pool/attention/query/kernel": (16, 2, 8),
    "pool/attention/query/bias": (2, 8),
    "pool/attention/key_value/kernel": (16, 2, 2, 8),
    "pool/attention/key_value/bias": (2, 2, 8),
    "pool/attention/out/kernel": (2, 8, 16),
    "pool/attention/out/bias": (16,),
    "pool/norm/scale": (16,),
    "pool/norm/bias": (16,),
    "pool/mlp/up/kernel": (16, 32),
    "pool/mlp/up/bias": (32,),
    "pool/mlp/down/kernel": (32, 16),
    "pool/mlp/down/bias": (16,),
}
SCALES = {"block_0/scale1": (16,), "block_0/scale2": (16,)}
CHANGES = {  # None: removed
    "plain": {},
    "deit_iii": SCALES | {"pos_embed": (1, 4, 16)},
    "dinov2": SCALES,
    "dinov2_registers": SCALES | {"pos_embed": (1, 4, 16), "register_tokens": (1, 4, 16)},
    "siglip": POOL
    | {"pos_embed": (1, 4, 16), "cls_token": None, "block_0/attention/qkv/bias": None},
    "siglip_gap": {"pos_embed": (1, 4, 16), "cls_token": None},
    "registers_gap": {"pos_embed": (1, 7, 16), "register_tokens": (1, 2, 16)},
    "registers_map": POOL | {"pos_embed": (1, 7, 16), "register_tokens": (1, 2, 16)},
    "clip": {"patches/bias": None, "norm_pre/scale": (16,), "norm_pre/bias": (16,)},
    "linear_classifier": SCALES | {"register_tokens": (1, 3, 16), "head/kernel": (32, 5)},
}
PLAIN = {
    "cls_token": (1, 1, 16),
    "pos_embed": (1, 5, 16),
    "patches/kernel": (48, 16),
    "patches/bias": (16,),
    "block_0/norm1/scale": (16,),
    "block_0/norm1/bias": (16,),
    "block_0/attention/qkv/kernel": (16, 3, 2, 8),
    "block_0/attention/qkv/bias": (3, 2, 8),
    "block_0/attention/out/kernel": (2, 8, 16),
    "block_0/attention/out/bias": (16,),
    "block_0/norm2/scale": (16,),
    "block_0/norm2/bias": (16,),
    "block_0/mlp/up/kernel": (16, 32),
    "block_0/mlp/up/bias": (32,),
    "block_0/mlp/down/kernel": (32, 16),
    "block_0/mlp/down/bias": (16,),
    "norm/scale": (16,),
    "norm/bias": (16,),
    "head/kernel": (16, 5),
    "head/bias": (5,),
}

# Parameter counts of timm's models with 1,000 labels.
PARAMETERS = {
    "deit3_small_patch16_224": 22_059_496,
    "deit3_small_patch16_384": 22_205_416,
    "deit3_base_patch16_224": 86_585_320,
    "deit3_base_patch16_384": 86_877_160,
    "deit3_large_patch16_224": 304_374_760,
    "deit3_large_patch16_384": 304_763_880,
    "vit_small_patch14_dinov2": 22_441_192,
    "vit_base_patch14_dinov2": 87_348_712,
    "vit_large_patch14_dinov2": 305_392_616,
    "vit_small_patch14_reg4_dinov2": 22_442_344,
    "vit_base_patch14_reg4_dinov2": 87_351_016,
    "vit_large_patch14_reg4_dinov2": 305_395_688,
    "vit_base_patch32_siglip_256": 95_321_320,
    "vit_base_patch16_siglip_224": 93_653_224,
    "vit_base_patch16_siglip_256": 93_699_304,
    "vit_base_patch16_siglip_384": 93_945_064,
    "vit_base_patch16_siglip_512": 94_289_128,
    "vit_large_patch16_siglip_256": 316_981_224,
    "vit_large_patch16_siglip_384": 317_308_904,
    "vit_large_patch16_siglip_512": 317_767_656,
    "vit_so400m_patch14_siglip_224": 428_833_704,
    "vit_so400m_patch14_siglip_378": 429_378_600,
    "vit_so400m_patch16_siglip_256": 429_041_064,
    "vit_so400m_patch16_siglip_384": 429_409_704,
    "vit_so400m_patch16_siglip_512": 429_925_800,
}


def flatten(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + EPS)
    return scaled * params["scale"] + params["bias"]


@functools.cache
def applied(name):
    """A variant's parameters, its logits for `images()`, and what its last stage records."""
    network = build(name)
    params = fill(network.init)
    return params, *apply(network, params, images())


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_has_expected_parameters(name):
    expected = {path: shape for path, shape in (PLAIN | CHANGES[name]).items() if shape}
    found = flatten(applied(name)[0]["stage_0"])
    assert {path: leaf.shape for path, leaf in found.items()} == expected


def test_initialisation_matches_timm():
    config = {"layer_scale": 0.25, "registers": 200, "pool": "attention", "patch": 8}
    network = vit.build(vit.ViTConfig(width=64, heads=2, depths=(1,), **config), IMAGES)
    params = jax.jit(network.init)(jax.random.key(0))["stage_0"]
    np.testing.assert_array_equal(params["block_0"]["scale1"], np.full(64, 0.25, np.float32))
    np.testing.assert_array_equal(params["block_0"]["scale2"], np.full(64, 0.25, np.float32))
    assert float(params["register_tokens"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(params["pool"]["probe"].std()) == pytest.approx(64**-0.5, rel=0.4)
    assert float(params["pool"]["attention"]["query"]["kernel"].std()) == pytest.approx(0.02, 0.1)
    assert not np.any(params["pool"]["attention"]["key_value"]["bias"])


def test_plain_vit_is_unchanged():
    # Outputs of the network from before it had variants.
    network = vit.build(vit.ViTConfig(depths=(1, 2), **SIZES), IMAGES)
    params = jax.jit(network.init)(jax.random.key(0))
    first = {path: float(leaf.ravel()[0]) for path, leaf in flatten(params).items()}
    started = {
        "stage_0/cls_token": -0.040411628782749176,
        "stage_0/pos_embed": 0.0028218573424965143,
        "stage_0/patches/kernel": 0.024919068440794945,
        "stage_1/head/kernel": -0.006077299360185862,
    }
    assert {path: first[path] for path in started} == pytest.approx(started, rel=1e-6)
    x = np.linspace(-1, 1, 8 * 8 * 3).reshape(1, 8, 8, 3).astype(np.float32)
    logits, _ = apply(network, params, x)
    computed = [0.0353158005, -0.1209434196, 0.1390371174, -0.0487372056, -0.0212652478]
    np.testing.assert_allclose(logits[0], computed, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", VARIANTS)
def test_token_embedding_by_hand(name):
    params, _, kept = applied(name)
    stage, x = params["stage_0"], images()
    squares = x.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 48)
    tokens = squares @ stage["patches"]["kernel"] + stage["patches"].get("bias", 0.0)
    config, table = sizes_of(name), np.asarray(stage["pos_embed"])
    tokens = tokens + table[:, -4:]
    leading = []
    if config.class_token:
        position = {"patches": 0.0}.get(config.positions, table[:, :1])
        leading.append(stage["cls_token"] + position)
    if config.registers:
        first = int(config.class_token)
        position = table[:, first : first + config.registers] if config.positions == "all" else 0.0
        leading.append(stage["register_tokens"] + position)
    leading = [np.broadcast_to(token, (2, *token.shape[1:])) for token in leading]
    tokens = np.concatenate([*leading, tokens], axis=1)
    if config.norm_pre:
        tokens = norm(tokens, stage["norm_pre"])
    np.testing.assert_allclose(kept["embedded"][0], tokens, rtol=1e-5, atol=1e-5)
    assert tokens.shape[1] == encoder.tokens(config.encoder, IMAGES)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


NUMPY = {
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * expit(1.702 * x),
}


def attention_pool(params, patches, activation):
    """SigLIP's head, one example and one head at a time."""
    pooled, attention = np.zeros((len(patches), patches.shape[-1])), params["attention"]
    one, two = attention["query"], attention["key_value"]
    for b, tokens in enumerate(patches):
        y = attention["out"]["bias"].astype(np.float64)
        for h in range(2):
            query = params["probe"][0, 0] @ one["kernel"][:, h] + one["bias"][h]
            key, value = (tokens @ two["kernel"][:, i, h] + two["bias"][i, h] for i in (0, 1))
            weights = softmax(key @ query / np.sqrt(8))
            y = y + weights @ value @ attention["out"]["kernel"][h]
        up, down = params["mlp"]["up"], params["mlp"]["down"]
        hidden = NUMPY[activation](norm(y, params["norm"]) @ up["kernel"] + up["bias"])
        pooled[b] = y + hidden @ down["kernel"] + down["bias"]
    return pooled


@pytest.mark.parametrize("name", VARIANTS)
def test_token_pooling_by_hand(name):
    params, logits, kept = applied(name)
    stage = jax.tree.map(np.asarray, params["stage_0"])
    config, tokens = sizes_of(name), np.asarray(kept["block"][-1])
    if not config.norm_after_pool:
        tokens = norm(tokens, stage["norm"])
    patches = tokens[:, int(config.class_token) + config.registers :]
    assert patches.shape == (2, 4, 16)
    if config.pool == "attention":
        features = attention_pool(stage["pool"], patches, config.activation)
    else:
        mean = patches.sum(axis=1) / 4
        both = np.concatenate([tokens[:, 0], mean], axis=-1)
        features = {"class": tokens[:, 0], "mean": mean, "class_and_mean": both}[config.pool]
    if config.norm_after_pool:
        features = norm(features, stage["norm"])
    np.testing.assert_allclose(kept["features"][0], features, rtol=1e-5, atol=1e-5)
    expected = features @ stage["head"]["kernel"] + stage["head"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_layer_scale_multiplies_the_branch_output():
    scaled, plain = build("dinov2", depths=(1, 2)), build("plain", depths=(1, 2))
    params = fill(scaled.init)
    folded = flatten(params)
    for path in [path for path in folded if "/scale1" in path or "/scale2" in path]:
        gain, block = folded.pop(path), path.rsplit("/", 1)[0]
        layer = {"scale1": "attention/out", "scale2": "mlp/down"}[path.rsplit("/", 1)[1]]
        for leaf in ("kernel", "bias"):
            folded[f"{block}/{layer}/{leaf}"] = folded[f"{block}/{layer}/{leaf}"] * gain
    folded = traverse_util.unflatten_dict(folded, sep="/")
    found, expected = apply(scaled, params, images())[0], apply(plain, folded, images())[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - apply(plain, params, images())[0]).max() > 0.1


@pytest.mark.parametrize("name", ["dinov2_registers", "siglip", "clip", "linear_classifier"])
def test_stages_match_the_whole_network(name):
    whole, parts = build(name, depths=(3,)), build(name, depths=(1, 1, 1))
    params = fill(whole.init)
    cut = {f"stage_{i}": {} for i in range(3)}
    for part, leaf in params["stage_0"].items():
        block = re.fullmatch(r"block_(\d)", part)
        last = part in ("norm", "pool", "head")
        stage = int(block[1]) if block else 2 * last
        cut[f"stage_{stage}"]["block_0" if block else part] = leaf
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(lambda x: x.shape, shapes_of(parts))
    found, expected = apply(parts, cut, images())[0], apply(whole, params, images())[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    example = parts.stages[0].example(2)
    tokens, _ = jax.eval_shape(functools.partial(parts.apply, stop=2), cut, example)
    assert tokens == parts.stages[2].example(2)


@pytest.mark.parametrize("name", ["dinov2_registers", "registers_map", "clip", "linear_classifier"])
def test_eight_devices_match_one(name):
    network, mesh = build(name), split_mesh()
    params, x = fill(network.init), images(8)
    shardings = match_rules(vit.PARTITION_RULES, params, mesh)
    one = apply(network, params, x)[0]
    with jax.set_mesh(mesh):
        eight = apply(network, jax.device_put(params, shardings), x)[0]
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)
    specs = {path: sharding.spec for path, sharding in flatten(shardings).items()}
    for path in CHANGES[name].keys() & {path.split("/", 1)[1] for path in specs}:
        assert (specs[f"stage_0/{path}"] == P()) == (not path.endswith("kernel")), path


def test_layer_scale_is_the_same_with_remat_and_scan():
    # With the draw at 0.5, rates below one half drop nothing, whatever is drawn in a loop.
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        real = encoder.drop_path
        patch.setattr(encoder, "drop_path", lambda x, u, rate: real(x, 0 * u + 0.5, rate))
        networks = [
            build("dinov2_registers", dtype=jnp.float64, drop_path=0.9, depths=(1, 2), **more)
            for more in ({}, {"remat": True}, {"scan_layers": True})
        ]
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), fill(networks[0].init))
        x, rngs = jnp.asarray(images(), jnp.float64), {"drop_path": jax.random.key(0)}
        results = []
        for network in networks:
            loss = lambda p, n=network: jnp.mean(n.apply(p, x, train=True, rngs=rngs)[0] ** 2)  # noqa: E731
            results.append(jax.jit(jax.value_and_grad(loss))(params))
    (loss, gradients), *others = results
    gradients = flatten(gradients)
    for other_loss, other in others:
        assert float(other_loss) == pytest.approx(float(loss), rel=1e-12)
        other = flatten(other)
        for path, one in gradients.items():
            scale = float(np.abs(one).max())
            np.testing.assert_allclose(other[path], one, rtol=0, atol=1e-12 * scale, err_msg=path)
    assert np.any(gradients["stage_0/block_0/scale1"])
    # The last block drops both of its branches, so their scales get no gradient.
    assert not np.any(gradients["stage_1/block_1/scale1"])


@pytest.mark.parametrize("name", VARIANTS)
def test_position_tables_are_resized_after_their_leading_rows(name):
    config = sizes_of(name).encoder
    leading = {"pos_embed": (1, 5, 16)} | CHANGES[name]
    leading = leading["pos_embed"][1] - 4
    table = np.random.default_rng(0).standard_normal((1, leading + 25, 6)).astype(np.float32)
    found = resizer(config.leading_positions)(table, (1, leading + 9, 6))
    np.testing.assert_array_equal(found[:, :leading], table[:, :leading])
    weights = resize_weights(5, 3)
    for d in range(6):
        grid = weights @ table[0, leading:, d].reshape(5, 5) @ weights.T
        np.testing.assert_allclose(found[0, leading:, d], grid.ravel(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=f"after {leading + 2} leading rows .* not a square grid"):
        resize_positions(table, leading + 9, leading + 2)
    with pytest.raises(ValueError, match=r"0 patches after .* not a square grid"):
        resize_positions(table, leading, leading)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_token": False}, r"^pool='class' needs a class token, but class_token=False"),
        ({"class_token": False, "pool": "class_and_mean"}, r"^pool='class_and_mean' needs a"),
        (
            {"class_token": False, "pool": "mean", "positions": "class"},
            r"^positions='class' gives the class token a position, but class_token=False",
        ),
        (
            {"pool": "class_and_mean", "norm_after_pool": True},
            r"^norm_after_pool=True norms a vector of width D, but pool='class_and_mean' gives 2 D",
        ),
        ({"pool": "max"}, r"^pool='max' must be one of \['class', 'mean', 'class_and_mean', 'at"),
        ({"positions": "none"}, r"^positions='none' must be one of \['all', 'class', 'patches'"),
        ({"activation": "relu"}, r"^activation='relu' must be one of \['gelu', 'gelu_tanh', 'qu"),
        ({"layer_scale": -1.0}, r"^layer_scale=-1.0 must be at least 0"),
        ({"registers": -1}, r"^registers=-1 must be at least 0"),
    ],
)
def test_invalid_fields_are_refused(fields, message):
    with pytest.raises(FieldError, match=message):
        vit.ViTConfig(**SIZES, **fields)


def test_experts_support_only_exact_gelu():
    config = vmoe.VMoEConfig(activation="quick_gelu", **SIZES)
    with pytest.raises(FieldError, match=r"^activation='quick_gelu' must be 'gelu' if blocks"):
        vmoe.build(config, IMAGES, stitch_width=None)
    dense = dataclasses.replace(config, moe_blocks="none")
    assert len(vmoe.build(dense, IMAGES, stitch_width=None)) == 4


def test_tokens_with_other_leading_tokens_are_refused():
    # From a network with one leading token, whose second and third tokens are patches.
    network = build("registers_gap", depths=(1, 1))
    params, tokens = fill(network.init), jnp.zeros((2, 5, 16))
    with pytest.raises(
        ValueError, match=r"pool='mean' expects 3 leading tokens and 4 patches, but"
    ):
        network.apply(params, tokens, start=1)
    plain = build("plain", depths=(1, 1))
    assert plain.apply(fill(plain.init), tokens, start=1)[0].shape == (2, 5)


@pytest.mark.parametrize("name", vit.PRETRAINED)
def test_pretrained_vits_have_their_published_sizes(name):
    config, side = vit.variant(name)
    assert side == int(re.search(r"_(\d{3})$", name)[1] if "dino" not in name else 518)
    assert config.norm_eps == 1e-6 and config.qkv_bias
    build = functools.partial(vit.build, interface=encoder.Interface(side, 3, 1000))
    assert count_parameters(build, config) == PARAMETERS[name]


def test_vit_names_are_unique():
    assert not vit.PRETRAINED.keys() & vit.VARIANTS.keys()
    assert vit.PRETRAINED.keys() == PARAMETERS.keys()
