"""mBART, mapping networks and the prefix: shapes, what hears what, and how they are split."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from tiny import fill
from tiny_cliptrans import tiny_config

from cliptrans_jax.decode import DecodeConfig, Search
from cliptrans_jax.encoders import TEXT_RULES
from cliptrans_jax.models import cliptrans, mapper, prefix
from cliptrans_jax.models.cliptrans import ModelConfig, Translator
from cliptrans_jax.models.mapper import MAPPERS, MapperConfig
from cliptrans_jax.models.mbart import MBart, MBartConfig, shift_right
from cliptrans_jax.models.prefix import PrefixConfig
from cliptrans_jax.models.xlmr import MClip, MClipConfig
from cliptrans_jax.runs import contrastive
from common_jax.mesh import MeshConfig, idle_rules, make_mesh, match_rules

WIDTH, VOCAB, FEATURES, PAD, EOS = 16, 40, 8, 1, 2
MBART = MBartConfig(
    vocab=VOCAB,
    width=WIDTH,
    encoder_layers=1,
    decoder_layers=1,
    encoder_heads=2,
    decoder_heads=2,
    encoder_hidden=24,
    decoder_hidden=24,
    positions=32,
)
# Six examples, so that a program does for several variants of the first one.
BATCH = 6
SOURCE = np.array([[30, 5, 6, 7, 8, EOS]] * BATCH, np.int32)
LABELS = np.array([[31, 11, 12, 13, 14, 15, EOS]] * BATCH, np.int32)
CLIP = np.array([np.random.default_rng(1).normal(size=FEATURES)] * BATCH, np.float32)


pytestmark = pytest.mark.usefixtures("compiled_quickly")


def translator(count, *, kind="mlp", rule=None, dtype=jnp.float32, **sizes):
    config = ModelConfig(
        dataclasses.replace(MBART, **sizes),
        MapperConfig(kind, prefix=count, features=FEATURES),
        rule or PrefixConfig(),
    )
    return Translator(config, dtype)


@functools.cache
def params_of(model):
    return fill(model.init)


@functools.cache
def compiled(model):
    """train_logits of a model."""

    def apply(params, features, source, labels, dropout):
        return model.train_logits(params, features, source, labels, dropout=dropout)

    return jax.jit(apply)


def logits(model, *, labels=LABELS, source=SOURCE, clip=CLIP, dropout=None, params=None):
    params = params_of(model) if params is None else params
    features = clip if model.config.mapper.prefix else None
    return np.asarray(compiled(model)(params, features, source, labels, dropout))


# Shapes.


@pytest.mark.parametrize("count", [0, 1, 4, 10, 13])
def test_the_prefix_is_as_long_as_the_config_says(count):
    model = translator(count)
    params = shapes_of(model)
    assert ("mapper" in params) is (count > 0)
    features = jax.ShapeDtypeStruct((2, FEATURES), jnp.float32) if count else None
    ids = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    vectors = jax.eval_shape(lambda p, x: model.prefix(p, x, 2), params, features)
    assert vectors.shape == (2, count, WIDTH)
    embeddings, visible = jax.eval_shape(model.decoder_input, params, features, ids)
    assert embeddings.shape == (2, 7 + count, WIDTH)
    assert visible.shape[1:] == (1, 7 + count, 7 + count)
    found = jax.eval_shape(model.train_logits, params, features, ids, ids)
    assert (found.shape, found.dtype) == ((2, 7, VOCAB), jnp.float32)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("mlp", {"out/kernel": (8, 64), "out/bias": (64,), "prelu/slope": (1,)}),
        (
            "hidden_mlp",
            {
                "hidden/kernel": (8, 16),
                "hidden/bias": (16,),
                "out/kernel": (16, 64),
                "out/bias": (64,),
                "prelu/slope": (1,),
            },
        ),
        (
            "transformer",
            {"project/kernel": (8, 64), "up/kernel": (16, 5), "down/kernel": (5, 16)},
        ),
    ],
)
def test_mappers_have_the_parameters_of_their_formulas(kind, shapes):
    network = mapper.build(MapperConfig(kind, prefix=4, features=8), WIDTH, jnp.float32)
    vectors, variables = jax.eval_shape(
        lambda key: network.init_with_output(key, jnp.zeros((2, 8)), False), jax.random.key(0)
    )
    assert vectors.shape == (2, 4, WIDTH)
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    held = {path: leaf.shape for path, leaf in params.items()}
    assert shapes.items() <= held.items()
    assert kind == "transformer" or shapes == held


def test_mappers_start_within_the_published_bounds():
    network = mapper.build(MapperConfig("hidden_mlp", prefix=4, features=8), 64, jnp.float32)
    params = jax.jit(network.init, static_argnums=2)(jax.random.key(0), CLIP, False)["params"]
    assert params["prelu"]["slope"] == 0.25
    for name, fan_in in (("hidden", 8), ("out", 64)):
        bound = 1 / math.sqrt(fan_in)
        for leaf in params[name].values():
            assert 0.9 * bound < np.abs(leaf).max() <= bound


def test_labels_are_shifted_behind_the_last_real_one():
    labels = jnp.array([[31, 7, EOS, -1, PAD], [31, 7, 8, 9, EOS]])
    assert shift_right(labels, pad=PAD).tolist() == [[2, 31, 7, 2, 1], [2, 31, 7, 8, 9]]


# What hears what.


def matrix(*rows):
    return np.array([[c == "x" for c in row] for row in rows])


def visibility(mask, *, count, rule):
    find = jax.jit(prefix.visibility, static_argnames=("prefix", "rule"))
    return np.asarray(find(jnp.array([mask]), prefix=count, rule=rule))[0, 0]


def test_a_prefix_hears_itself_and_nothing_else_hears_what_comes_later():
    heard = visibility([True] * 5, count=2, rule="prefix")
    assert (heard == matrix("x....", "xxx..", "xxx..", "xxxx.", "xxxxx")).all()
    heard = visibility([True, True, True, True, False], count=2, rule="prefix")
    assert (heard == matrix("x....", "xxx..", "xxx..", "xxxx.", "xxxx.")).all()
    heard = visibility([True] * 3, count=0, rule="prefix")
    assert (heard == matrix("x..", "xx.", "xxx")).all()


def test_the_original_opens_slots_1_to_10_whatever_they_hold():
    heard = visibility([True, True, True, False], count=2, rule="original")
    assert (heard == matrix("x...", "xxxx", "xxxx", "xxxx")).all()
    heard = visibility([True] * 12 + [False], count=12, rule="original")
    later = ["xxxxxxxxxxx.."] * 10 + ["xxxxxxxxxxxx."] * 2
    assert (heard == matrix("x............", *later)).all()


def test_the_two_rules_agree_for_a_prefix_of_ten():
    for length in (11, 15):
        mask = [True] * 11 + [True, False] * 2
        rules = (visibility(mask[:length], count=10, rule=rule) for rule in prefix.MASKS)
        assert np.array_equal(*rules)


@pytest.mark.parametrize("layout", prefix.LAYOUTS)
def test_what_decoding_begins_with(layout):
    start, vectors, language = (jnp.full((1, n, 3), v) for n, v in ((1, 7.0), (2, 8.0), (1, 9.0)))
    for mask in prefix.MASKS:
        config = PrefixConfig(layout=layout, mask=mask)
        block, heard = prefix.start_block(start, vectors, language, config)
        first = [7, 8, 8, 9] if layout == "training" else [8, 8, 7, 9]
        assert block[0, :, 0].tolist() == first
        assert (np.asarray(heard)[0, 0] == matrix("x...", "xxx.", "xxx.", "xxxx")).all()
        block, heard = prefix.start_block(start, vectors[:, :0], language, config)
        assert block[0, :, 0].tolist() == [7, 9]
        assert (np.asarray(heard)[0, 0] == matrix("x.", "xx")).all()


def test_other_layouts_and_masks_are_refused():
    with pytest.raises(ValueError, match=r"^layout='published' must be one"):
        PrefixConfig(layout="published")
    with pytest.raises(ValueError, match=r"^mask='causal' must be one"):
        PrefixConfig(mask="causal")


@pytest.mark.parametrize("count", [0, 4, 13])
def test_no_word_is_heard_before_its_turn(count):
    model = translator(count)
    labels = LABELS.copy()
    for place in range(1, BATCH):
        labels[place, place:6] = 20 + np.arange(6 - place)
    found = logits(model, labels=labels)
    for place in range(1, BATCH):  # label `place` is predicted from the labels before it
        same, other = found[:, : place + 1], found[:, place + 1 :]
        np.testing.assert_allclose(same[place], same[0], rtol=1e-6, atol=1e-6)
        assert np.abs(other[place] - other[0]).max() > 1e-3


def test_the_original_mask_leaks_words_into_a_short_prefix():
    labels = LABELS.copy()
    labels[1, 5] = 20
    for count, leaks in ((4, True), (13, False)):
        found = logits(translator(count, rule=PrefixConfig(mask="original")), labels=labels)
        apart = np.abs(found[1] - found[0]).max(axis=-1)
        assert apart[0] < 1e-5  # `</s>` hears itself alone
        assert (apart[1:6].max() > 1e-3) == leaks
        assert leaks or apart[:6].max() < 1e-5


def test_padding_changes_nothing():
    model, (source, labels) = translator(4), (SOURCE.copy(), LABELS.copy())
    source[:, 2:], labels[:, 3:] = PAD, PAD
    source[:, 2], labels[:, 3] = EOS, EOS
    whole = logits(model, source=source, labels=labels)[:, :4]
    alone = logits(model, source=source[:, :3], labels=labels[:, :4])
    np.testing.assert_allclose(alone, whole, rtol=1e-4, atol=1e-5)


def test_the_source_and_the_features_are_heard():
    source, clip = SOURCE.copy(), CLIP.copy()
    source[1, 2] = 20
    clip[2] += 1
    found = logits(translator(4), source=source, clip=clip)
    assert np.abs(found[1] - found[0]).max() > 1e-3
    apart = np.abs(found[2] - found[0]).max(axis=-1)
    assert apart[0] < 1e-5  # the language code is `</s>`'s to predict, which hears no feature
    assert apart[1:].min() > 1e-3


def test_slots_of_the_prefix_are_left_out_of_the_logits():
    model = translator(4)

    def every(params, *inputs):
        states = model.decode_labels(params, *inputs)
        return model.network.apply({"params": params["mbart"]}, states, method=MBart.logits)

    found = jax.jit(every)(params_of(model), CLIP, SOURCE, LABELS)
    assert found.shape == (BATCH, 11, VOCAB)
    kept = np.concatenate([found[:, :1], found[:, 5:]], axis=1)
    np.testing.assert_allclose(logits(model), kept, rtol=1e-5, atol=1e-5)
    ignored = prefix.insert_ignored(jnp.asarray(LABELS), 4)
    assert ignored[0].tolist() == [31, -1, -1, -1, -1, *LABELS[0, 1:]]
    removed = prefix.remove(ignored[:, :, None].astype(jnp.float32), 4)[:, :, 0]
    assert removed.tolist() == LABELS.tolist()


def prefilled(model):
    """The decoder's states at the start of a search, and in training."""
    search = Search(model, DecodeConfig(beams=1, max_new_tokens=4))

    def both(params, features, source, labels):
        states = model.encode(params, source)
        hidden, _ = search.prefill(params, features, source, states, labels[:, 0])
        return hidden, model.decode_labels(params, features, source, labels)

    features = CLIP if model.config.mapper.prefix else None
    return map(np.asarray, jax.jit(both)(params_of(model), features, SOURCE, LABELS))


@pytest.mark.parametrize("count", [0, 4, 13])
def test_decoding_begins_as_training_did(count):
    hidden, trained = prefilled(translator(count))
    np.testing.assert_allclose(hidden, trained[:, : count + 2], rtol=1e-4, atol=1e-5)


def test_the_original_layout_begins_otherwise():
    hidden, trained = prefilled(translator(10, rule=PrefixConfig("original", "original")))
    assert np.abs(hidden[:, -1] - trained[:, 11]).max() > 1e-3


# Dropout and precision.


def test_dropout_is_the_keys():
    model = translator(4)
    plain = logits(model)
    one, again, other = (logits(model, dropout=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - plain).max() > 1e-3
    np.testing.assert_array_equal(plain, logits(model))
    assert np.abs(one - one[:1]).max() > 1e-3  # every example draws its own
    np.testing.assert_allclose(plain, np.broadcast_to(plain[:1], plain.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(MAPPERS))
def test_only_the_transformer_mapper_drops_out(kind):
    model = translator(4, kind=kind)
    find = jax.jit(lambda params, key: model.prefix(params, jnp.asarray(CLIP), BATCH, dropout=key))
    plain, one = (find(params_of(model), key) for key in (None, jax.random.key(0)))
    assert np.allclose(plain, one, rtol=1e-5, atol=1e-6) is (kind != "transformer")


def test_half_precision_runs_and_gives_float32():
    half, whole = translator(4, dtype=jnp.bfloat16), translator(4)
    rough, exact = logits(half, params=params_of(whole)), logits(whole)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()
    assert np.isfinite(rough).all()


# How parameters are split.


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def tower_shapes(config):
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(MClip(config, jnp.float32).init, jax.random.key(0), ids, ids)["params"]


def test_rules_match_every_parameter_and_none_is_idle():
    mesh = make_mesh(MeshConfig(fsdp=8))
    trees = [shapes_of(translator(4, kind=kind)) for kind in MAPPERS]
    for tree in trees:
        shardings = match_rules(cliptrans.PARTITION_RULES, tree, mesh)
        for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
            assert (
                len(leaf.shape) < 2
                or place.shard_shape(leaf.shape) != leaf.shape
                or (
                    leaf.shape in {(3, 2, 8), (2, 8), (2, 2, 8)}  # biases of attentions
                )
            )
    assert idle_rules(cliptrans.PARTITION_RULES, *trees) == []


def test_rules_of_stage_clip_match_its_towers():
    config = tiny_config("clip", None)
    tree = jax.eval_shape(functools.partial(contrastive.init, config), jax.random.key(0))
    match_rules(contrastive.PARTITION_RULES, tree, make_mesh(MeshConfig(fsdp=8)))
    idle = idle_rules(contrastive.PARTITION_RULES, tree)
    assert idle == [regex for regex, _ in contrastive.PARTITION_RULES if "words" in regex][1:]


def test_the_published_model_fits_sixteen_devices_of_16_gigabytes():
    tree = shapes_of(Translator(ModelConfig())) | {"clip": tower_shapes(MClipConfig())}
    for kind in MAPPERS:
        network = mapper.build(MapperConfig(kind), MBartConfig().width, jnp.float32)
        features = jax.ShapeDtypeStruct((1, 512), jnp.float32)
        init = functools.partial(network.init, train=False)
        tree["mapper"] = jax.eval_shape(init, jax.random.key(0), features)["params"]
        whole, split = count_parameters(tree, fsdp=16)
        assert 1.17e9 < whole < 1.20e9
        assert 3 * 4 * split < 16e9  # bytes, with Adam's two moments, all in float32


def count_parameters(tree, *, fsdp):
    """All of them, and those on each device, by the rules alone."""
    rules = (*cliptrans.PARTITION_RULES, *TEXT_RULES[MClipConfig])
    whole = split = 0
    for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        spec = next(spec for regex, spec in rules if re.search(regex, "/" + path))
        for size, axis in zip(leaf.shape, spec, strict=False):
            assert axis is None or size % fsdp == 0, path
        parts = fsdp if "fsdp" in tuple(spec) else 1
        assert parts > 1 or leaf.size < 300_000, path  # nothing large is held whole
        whole += leaf.size
        split += leaf.size // parts
    return whole, split
