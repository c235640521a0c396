"""mBART, mapping networks and the prefix: shapes, numbers, attention masks."""

import collections
import dataclasses
import functools

import jax
import naive_cliptrans as naive
import numpy as np
import pytest
from dropouts import dropouts
from jax import numpy as jnp
from tiny import fill
from tiny_cliptrans import UNEVEN

from cliptrans_jax.decode import DecodeConfig, Search
from cliptrans_jax.models import cliptrans_names, prefix
from cliptrans_jax.models.cliptrans import ModelConfig, Translator
from cliptrans_jax.models.mapper import MAPPERS, MapperConfig
from cliptrans_jax.models.prefix import PrefixConfig
from cliptrans_jax.translators.mbart import MBart, MBartConfig, shift_right
from common_jax.weights import table as tables

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
# Six examples, so that one program computes several variants of the first.
BATCH = 6
SOURCE = np.array([[30, 5, 6, 7, 8, EOS]] * BATCH, np.int32)
LABELS = np.array([[31, 11, 12, 13, 14, 15, EOS]] * BATCH, np.int32)
CLIP = np.array([np.random.default_rng(1).normal(size=FEATURES)] * BATCH, np.float32)
IDS = {"pad": 1, "eos": 2, "start": 2}
ONE_HEAD = {"encoder_heads": 1, "decoder_heads": 1}


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
    """A model's train_logits, compiled."""

    def apply(params, features, source, labels, dropout):
        return model.train_logits(params, features, source, labels, dropout=dropout)

    return jax.jit(apply)


def logits(model, *, labels=LABELS, source=SOURCE, clip=CLIP, dropout=None, params=None):
    params = params_of(model) if params is None else params
    features = clip if model.config.mapper.prefix else None
    return np.asarray(compiled(model)(params, features, source, labels, dropout))


# Shapes.


@pytest.mark.parametrize("count", [0, 1, 4, 10, 13])
def test_prefix_has_the_configured_length(count):
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


def test_default_sizes_are_the_published_model():
    sides = ("encoder", "decoder")
    sizes = {"layers": 12, "heads": 16, "hidden": 4096}
    assert dataclasses.asdict(MBartConfig()) == {
        "vocab": 250054,
        "width": 1024,
        **{f"{side}_{name}": size for side in sides for name, size in sizes.items()},
        "positions": 1024,
        "dropout": 0.1,
        "scale_embedding": True,
        **IDS,
        "attention": "auto",
        "remat": False,
        "scan_layers": False,
    }
    assert dataclasses.astuple(MapperConfig()) == ("mlp", 10, 512, 0.1)
    assert dataclasses.astuple(PrefixConfig()) == ("training", "prefix")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MBartConfig(encoder_heads=3), r"^encoder_heads=3 must divide width=1024"),
        (lambda: MBartConfig(decoder_heads=5), r"^decoder_heads=5 must divide width=1024"),
        *(
            (lambda name=name: MBartConfig(vocab=9, **IDS | {name: 9}), rf"^{name}=9 must be below")
            for name in ("pad", "eos", "start")
        ),
        (lambda: translator(4, kind="transformer", width=15, **ONE_HEAD), r"^mbart\.width=15 must"),
        (lambda: translator(4, kind="transformer", width=2, **ONE_HEAD), r"^mbart\.width=2 must"),
        (lambda: PrefixConfig(layout="published"), r"^layout='published' must be one"),
        (lambda: PrefixConfig(mask="causal"), r"^mask='causal' must be one"),
        (lambda: MapperConfig("lstm"), r"^kind='lstm' must be one"),
    ],
)
def test_invalid_models_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_valid_mapper_widths_are_accepted():
    for kind, count, width in (("transformer", 4, 4), ("transformer", 0, 15), ("mlp", 4, 15)):
        model = translator(count, kind=kind, width=width, **ONE_HEAD)
        assert model.config.mbart.width == width
    assert MBartConfig(vocab=9, pad=8, eos=8, start=8).pad == 8


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def test_labels_are_shifted_and_start_with_the_last_real_token():
    labels = jnp.array([[31, 7, EOS, -1, PAD], [31, 7, 8, 9, EOS]])
    assert shift_right(labels, pad=PAD).tolist() == [[2, 31, 7, 2, 1], [2, 31, 7, 8, 9]]


# Numbers, compared with plain numpy.

SIZES_OF_NUMBERS = (1.0, 0.02)  # small enough that the epsilon of every norm shows


def test_model_matches_a_naive_implementation():
    mbart = dataclasses.replace(UNEVEN, decoder_layers=2)
    model = Translator(ModelConfig(mbart, MapperConfig(prefix=3, features=FEATURES)))
    clip = np.stack([CLIP[0], -CLIP[0]])
    source = np.array([[30, 5, 6, 7, 8, EOS], [31, 9, EOS, PAD, PAD, PAD]], np.int32)
    labels = np.array([[31, 11, 12, 13, 14, EOS], [30, 15, EOS, PAD, PAD, PAD]], np.int32)
    for size in SIZES_OF_NUMBERS:
        params = jax.tree.map(lambda x, size=size: size * x, params_of(model))
        tensors = tables.write(cliptrans_names.table(model.config), params)
        found = logits(model, source=source, labels=labels, clip=clip, params=params)
        adapter = naive.Weights(tensors, "adapter.")
        wanted = [
            naive.cliptrans_logits(
                tensors,
                naive.prefix(adapter, "mlp", clip[row], 3),
                source[row],
                labels[row],
                heads=(UNEVEN.encoder_heads, UNEVEN.decoder_heads),
            )
            for row in range(2)
        ]
        scale = np.std(wanted - tensors["mbart.final_logits_bias"])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3 * scale)


# Attention masks.


def matrix(*rows):
    return np.array([[c == "x" for c in row] for row in rows])


def visibility(mask, *, count, rule):
    find = jax.jit(prefix.visibility, static_argnames=("count", "rule"))
    return np.asarray(find(jnp.array([mask]), count=count, rule=rule))[0, 0]


def test_prefix_attends_to_itself_and_the_rest_is_causal():
    visible = visibility([True] * 5, count=2, rule="prefix")
    assert (visible == matrix("x....", "xxx..", "xxx..", "xxxx.", "xxxxx")).all()
    visible = visibility([True, True, True, True, False], count=2, rule="prefix")
    assert (visible == matrix("x....", "xxx..", "xxx..", "xxxx.", "xxxx.")).all()
    visible = visibility([True] * 3, count=0, rule="prefix")
    assert (visible == matrix("x..", "xx.", "xxx")).all()


def test_original_mask_always_shows_slots_1_to_10():
    visible = visibility([True, True, True, False], count=2, rule="original")
    assert (visible == matrix("x...", "xxxx", "xxxx", "xxxx")).all()
    visible = visibility([True] * 12 + [False], count=12, rule="original")
    later = ["xxxxxxxxxxx.."] * 10 + ["xxxxxxxxxxxx."] * 2
    assert (visible == matrix("x............", *later)).all()


def test_both_masks_agree_for_a_prefix_of_ten():
    for length in (11, 15):
        mask = [True] * 11 + [True, False] * 2
        rules = (visibility(mask[:length], count=10, rule=rule) for rule in prefix.MASKS)
        assert np.array_equal(*rules)


@pytest.mark.parametrize("layout", prefix.LAYOUTS)
def test_decoding_begins_with_start_prefix_and_language(layout):
    start, vectors, language = (jnp.full((1, n, 3), v) for n, v in ((1, 7.0), (2, 8.0), (1, 9.0)))
    for mask in prefix.MASKS:
        config = PrefixConfig(layout=layout, mask=mask)
        block, visible = prefix.start_block(start, vectors, language, config)
        first = [7, 8, 8, 9] if layout == "training" else [8, 8, 7, 9]
        assert block[0, :, 0].tolist() == first
        assert (np.asarray(visible)[0, 0] == matrix("x...", "xxx.", "xxx.", "xxxx")).all()
        block, visible = prefix.start_block(start, vectors[:, :0], language, config)
        assert block[0, :, 0].tolist() == [7, 9]
        assert (np.asarray(visible)[0, 0] == matrix("x.", "xx")).all()


def test_decoding_begins_with_the_configured_mask():
    start, language = jnp.zeros((1, 1, 3)), jnp.ones((1, 1, 3))
    for mask, last in (("prefix", 12), ("original", 10)):
        config = PrefixConfig(mask=mask)
        _, visible = prefix.start_block(start, jnp.zeros((1, 12, 3)), language, config)
        wanted = np.tril(np.ones((14, 14), bool))
        wanted[1:13, 1 : last + 1] = True
        np.testing.assert_array_equal(visible[0, 0], wanted)


def test_decoder_inputs_in_training():
    """`</s>`, the prefix unscaled, and scaled words; nothing attends to pads, except in the
    original's slots 1 to 10."""
    labels = jnp.asarray([[31, 7, EOS, PAD, PAD]])
    causal = matrix("x......", "xxx....", "xxx....", "xxxx...", "xxxxx..", "xxxxxx.", "xxxxxx.")
    opened = matrix("x......", *["xxxxxxx"] * 6)
    for count, rule, wanted in (
        (2, "prefix", causal),
        (2, "original", opened),
        (0, "original", np.tril(np.ones((5, 5), bool))),
    ):
        model = translator(count, rule=PrefixConfig(mask=rule))
        params, features = params_of(model), jnp.asarray(CLIP[:1]) if count else None
        read, visible = jax.jit(model.decoder_input)(params, features, labels)
        np.testing.assert_array_equal(visible[0, 0], wanted)
        words = 4 * np.asarray(params["mbart"]["embedding"])[[EOS, 31, 7, EOS, PAD]]
        np.testing.assert_allclose(np.delete(read[0], slice(1, 1 + count), 0), words, rtol=1e-6)
        if count:
            table = cliptrans_names.mapper_table(model.config.mapper)
            adapter = naive.Weights(tables.write(table, params["mapper"]))
            vectors = naive.prefix(adapter, "mlp", CLIP[0], count)
            np.testing.assert_allclose(read[0, 1 : 1 + count], vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 4, 13])
def test_decoder_is_causal(count):
    model = translator(count)
    labels = LABELS.copy()
    for place in range(1, BATCH):
        labels[place, place:6] = 20 + np.arange(6 - place)
    found = logits(model, labels=labels)
    for place in range(1, BATCH):  # label `place` is predicted from the labels before it
        same, other = found[:, : place + 1], found[:, place + 1 :]
        np.testing.assert_allclose(same[place], same[0], rtol=1e-6, atol=1e-6)
        assert np.abs(other[place] - other[0]).max() > 1e-3


def test_original_mask_leaks_words_into_a_short_prefix():
    labels = LABELS.copy()
    labels[1, 5] = 20
    for count, leaks in ((4, True), (13, False)):
        found = logits(translator(count, rule=PrefixConfig(mask="original")), labels=labels)
        apart = np.abs(found[1] - found[0]).max(axis=-1)
        assert apart[0] < 1e-5  # `</s>` attends only to itself
        assert (apart[1:6].max() > 1e-3) == leaks
        assert leaks or apart[:6].max() < 1e-5


def test_padding_has_no_effect():
    model, (source, labels) = translator(4), (SOURCE.copy(), LABELS.copy())
    source[:, 2:], labels[:, 3:] = PAD, PAD
    source[:, 2], labels[:, 3] = EOS, EOS
    whole = logits(model, source=source, labels=labels)[:, :4]
    alone = logits(model, source=source[:, :3], labels=labels[:, :4])
    np.testing.assert_allclose(alone, whole, rtol=1e-4, atol=1e-5)


def test_logits_depend_on_source_and_features():
    source, clip = SOURCE.copy(), CLIP.copy()
    source[1, 2] = 20
    clip[2] += 1
    found = logits(translator(4), source=source, clip=clip)
    assert np.abs(found[1] - found[0]).max() > 1e-3
    apart = np.abs(found[2] - found[0]).max(axis=-1)
    assert apart[0] < 1e-5  # the language code is predicted by `</s>`, which attends to no feature
    assert apart[1:].min() > 1e-3


def test_logits_exclude_the_prefix():
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
def test_start_of_decoding_matches_training(count):
    hidden, trained = prefilled(translator(count))
    np.testing.assert_allclose(hidden, trained[:, : count + 2], rtol=1e-4, atol=1e-5)


def test_original_layout_starts_decoding_with_the_prefix():
    hidden, trained = prefilled(translator(10, rule=PrefixConfig("original", "original")))
    assert np.abs(hidden[:, -1] - trained[:, 11]).max() > 1e-3


# Dropout and precision.


def test_dropout_depends_on_the_key():
    model = translator(4)
    plain = logits(model)
    one, again, other = (logits(model, dropout=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - plain).max() > 1e-3
    np.testing.assert_array_equal(plain, logits(model))
    assert np.abs(one - one[:1]).max() > 1e-3  # every example has its own draw
    np.testing.assert_allclose(plain, np.broadcast_to(plain[:1], plain.shape), rtol=1e-5, atol=1e-5)


def test_embeddings_and_branches_have_dropout_only_in_training():
    """With all branches zero, the norms of the embeddings are left, and of these the last bias."""
    model = translator(0, dropout=0.3, encoder_layers=2, decoder_layers=2)
    params, labels = params_of(model), jnp.asarray(LABELS[:1])
    tensors = naive.Weights(tables.write(cliptrans_names.table(model.config), params), "mbart.")
    decoder = tensors.below("model.decoder.")
    words = naive.embed(tensors.below("model."), [EOS, *LABELS[0, :-1]])
    x = decoder.norm("layernorm_embedding", words + decoder["embed_positions.weight"][2:9])

    def run(key, zero):
        with dropouts(zero) as calls:
            states = jax.jit(
                lambda params: model.label_states(params, None, labels, labels, dropout=key)
            )(params)
        return states[0], calls

    for zero, left in ((lambda path: path[1] != "drop", x), (lambda path: True, 0 * x)):
        states, calls = run(jax.random.key(0), zero)
        wanted = decoder.norm("layer_norm", left)
        np.testing.assert_allclose(states, wanted, rtol=1e-4, atol=1e-5)
        assert {rate for _, rate, _ in calls} == {0.3}
        count = collections.Counter(path[:2] for path, _, _ in calls)
        assert count == {
            **{(side, "drop"): 1 for side in ("encoder", "decoder")},
            **{("encoder", f"layer_{i}"): 2 for i in range(2)},
            **{("decoder", f"layer_{i}"): 3 for i in range(2)},
        }
    assert run(None, zero)[1] == []


@pytest.mark.parametrize("kind", list(MAPPERS))
def test_only_the_transformer_mapper_has_dropout(kind):
    model = translator(4, kind=kind)
    find = jax.jit(lambda params, key: model.prefix(params, jnp.asarray(CLIP), BATCH, dropout=key))
    plain, one = (find(params_of(model), key) for key in (None, jax.random.key(0)))
    assert np.allclose(plain, one, rtol=1e-5, atol=1e-6) is (kind != "transformer")


def test_mapper_dropout_is_active_in_a_training_step():
    model = translator(4, kind="transformer")
    labels, features = jnp.asarray(LABELS), jnp.asarray(CLIP)

    def step(params):
        return model.train_logits(params, features, labels, labels, dropout=jax.random.key(0))

    with dropouts() as calls:
        jax.eval_shape(step, shapes_of(model))
    shapes = [shape for path, _, shape in calls if path[0] not in ("encoder", "decoder")]
    assert shapes == [(BATCH, 4, WIDTH), (BATCH, 4, WIDTH // 3), (BATCH, 4, WIDTH)]


def test_bfloat16_model_gives_float32_logits():
    half, whole = translator(4, dtype=jnp.bfloat16), translator(4)
    rough, exact = logits(half, params=params_of(whole)), logits(whole)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()
    assert np.isfinite(rough).all()


def test_sequences_beyond_the_positions_are_refused():
    def shape(function, *inputs):
        return jax.eval_shape(function, params_of(model), *inputs)

    model = translator(4, positions=10)
    long = np.full((BATCH, 11), 5, np.int32)
    assert shape(model.train_logits, CLIP, long[:, :10], LABELS[:, :6]).shape[:2] == (BATCH, 6)
    for run in (
        lambda: shape(model.encode, long),
        lambda: shape(model.train_logits, CLIP, SOURCE, LABELS),
        lambda: shape(
            Search(model, DecodeConfig(max_new_tokens=7)).run, CLIP, SOURCE, SOURCE[:, 0]
        ),
    ):
        with pytest.raises(ValueError, match=r"a sequence of 11 tokens, prefix included, .*=10;"):
            run()
    shape(Search(model, DecodeConfig(max_new_tokens=6)).run, CLIP, SOURCE, SOURCE[:, 0])


@pytest.mark.parametrize("features", [None, CLIP[:, :3]])
def test_features_of_another_shape_are_refused(features):
    model = translator(4)
    with pytest.raises(ValueError, match=r"features .* must have shape \(6, 8\), .*prefix=4"):
        jax.eval_shape(model.train_logits, params_of(model), features, SOURCE, LABELS)
