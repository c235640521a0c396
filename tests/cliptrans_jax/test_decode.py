"""Beam search returns the same as a plain search without a cache."""

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from meshes import split_mesh

from cliptrans_jax.decode import NEVER, DecodeConfig, Search
from cliptrans_jax.models.cliptrans import ModelConfig, Translator, partition_rules
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.models.prefix import PrefixConfig
from cliptrans_jax.translators.mbart import MBart, MBartConfig
from common_jax.mesh import BATCH, MeshConfig, make_mesh, match_rules

VOCAB, PAD, END, START = 14, 1, 2, 2
LIMIT = 8  # new tokens
MBART = MBartConfig(
    vocab=VOCAB,
    width=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_heads=2,
    decoder_heads=2,
    encoder_hidden=16,
    decoder_hidden=16,
    positions=32,
)
PREFIXES = {
    "none": (0, "training"),
    "training": (3, "training"),
    "original": (3, "original"),
}


SCALES = (("kernel", 0.25), ("embedding", 0.75), ("bias", 0.3), ("scale", 1.0), ("slope", 1.0))


@functools.cache
def model(kind):
    """A translator, and parameters with which searches end early or late."""
    count, layout = PREFIXES[kind]
    config = ModelConfig(MBART, MapperConfig(prefix=count, features=4), PrefixConfig(layout))
    translator = Translator(config)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        scale = next(scale for end, scale in SCALES if path[-1].key.endswith(end))
        return jnp.asarray(scale * rng.normal(size=leaf.shape), "float32")

    shapes = jax.eval_shape(translator.init, jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    params["mbart"]["logits_bias"] = params["mbart"]["logits_bias"].at[END].set(2.0)
    return translator, params


def inputs(translator, batch=3):
    """Features, sources of different lengths and languages."""
    rng = np.random.default_rng(1)
    source = rng.integers(3, VOCAB, (batch, 6)).astype("int32")
    for row, length in enumerate(itertools.islice(itertools.cycle((6, 3, 4)), batch)):
        source[row, length - 1] = END
        source[row, length:] = PAD
    features = rng.normal(size=(batch, 4)).astype("float32")
    language = rng.integers(3, 6, batch).astype("int32")
    return features if translator.config.mapper.prefix else None, source, language


@functools.cache
def program(kind, config):
    return jax.jit(Search(model(kind)[0], config).run)


def settings(**changes):
    return DecodeConfig(**{"max_new_tokens": LIMIT, "growth": 1} | changes)


def search(kind, *arguments, **changes):
    found = program(kind, settings(**changes))(model(kind)[1], *arguments)
    return jax.device_get(found)


@functools.cache
def forward(kind):
    """(features, source, ids) -> log-probabilities of what follows each id. Rows of ids start with
    START and end in pads; the decoder reads all positions at once."""
    translator, params = model(kind)

    def train(features, source, ids):
        # Training shifts its labels right and puts the last one, the end, first. No id attends to
        # the ends after it, which replace pads.
        labels = jnp.where(ids == PAD, END, ids)
        labels = jnp.concatenate([labels[:, 1:], jnp.full_like(ids[:, :1], END)], axis=1)
        return translator.train_logits(params, features, source, labels)

    def original(features, source, ids):
        network, variables = translator.network, {"params": params["mbart"]}
        words = network.apply(variables, ids, method=MBart.embed)
        prefix = translator.prefix(params, features, len(ids))
        count, slots = prefix.shape[1], prefix.shape[1] + ids.shape[1]
        visible = np.tril(np.ones((slots, slots), bool))
        visible[1 : count + 1, 1 : count + 1] = True
        hidden = network.apply(
            variables,
            jnp.concatenate([prefix, words], axis=1),
            translator.encode(params, source),
            source != PAD,
            jnp.asarray(visible)[None, None],
            method=MBart.decode,
        )
        return network.apply(variables, hidden[:, count:], method=MBart.logits)

    logits = original if kind == "original" else train
    return jax.jit(lambda *inputs: jax.nn.log_softmax(logits(*inputs)))


def plain_search(kind, features, source, language, config):
    """Beam search for one example, as a list of (score, ids), best first."""

    def follow(hypotheses):
        """Log-probabilities of the next tokens for each hypothesis."""
        rows = np.full((config.beams, LIMIT + 1), PAD, "int32")
        for row, (_, ids) in zip(rows, hypotheses, strict=True):
            row[: len(ids)] = ids
        repeated = [None if x is None else np.stack([x] * config.beams) for x in (features, source)]
        return np.asarray(forward(kind)(*repeated, rows))[:, len(hypotheses[0][1]) - 1]

    beams = [(0.0 if beam == 0 else NEVER, [START, language]) for beam in range(config.beams)]
    finished = []
    for length in range(2, config.max_new_tokens + 1):
        if length == config.max_new_tokens:
            candidates = [(score, ids, END) for score, ids in beams]
        else:
            candidates = [
                (score + step, ids, token)
                for (score, ids), steps in zip(beams, follow(beams), strict=True)
                for token, step in enumerate(steps)
            ]
        candidates.sort(key=lambda candidate: -candidate[0])
        beams = []
        for rank, (score, ids, token) in enumerate(candidates[: 2 * config.beams]):
            if token != END:
                beams.append((score, [*ids, token]))
            elif rank < config.beams:
                finished.append((score / length**config.length_penalty, ids))
        beams = beams[: config.beams]
        finished = sorted(finished, key=lambda item: -item[0])[: config.beams]
        best = candidates[0][0] / length**config.length_penalty
        if len(finished) == config.beams and (config.early_stopping or finished[-1][0] >= best):
            break
    return finished


CASES = [  # every kind with both numbers of beams, and both with the default length penalty
    ("none", 1, True, 0.0),
    ("none", 5, False, 2.0),
    ("training", 1, False, 1.0),
    ("training", 5, True, 0.0),
    ("original", 1, True, 2.0),
    ("original", 5, False, 1.0),
]


@pytest.mark.parametrize(("kind", "beams", "early_stopping", "length_penalty"), CASES)
def test_search_matches_a_plain_search_without_cache(kind, beams, early_stopping, length_penalty):
    config = settings(beams=beams, early_stopping=early_stopping, length_penalty=length_penalty)
    features, source, language = inputs(model(kind)[0])
    run = program(kind, config)
    found = jax.device_get(run(model(kind)[1], features, source, language))
    for row in range(len(source)):
        feature = None if features is None else features[row]
        wanted = plain_search(kind, feature, source[row], language[row], config)
        assert found.lengths[row].tolist() == [len(ids) for _, ids in wanted]
        for beam, (score, ids) in enumerate(wanted):
            assert found.tokens[row, beam, : len(ids)].tolist() == ids
            assert (found.tokens[row, beam, len(ids) :] == PAD).all()
            np.testing.assert_allclose(found.scores[row, beam], score, rtol=1e-5, atol=1e-5)
        assert (np.diff(found.scores[row]) <= 0).all()


def assert_same_hypotheses(found, wanted):
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5, atol=1e-5)


def test_outputs_do_not_depend_on_other_examples_or_pads():
    config = {"beams": 5, "early_stopping": False, "length_penalty": 2.0}
    features, source, language = inputs(model("training")[0])
    together = search("training", features, source, language, **config)
    row = 1
    length = int(np.sum(source[row] != PAD))
    assert length < source.shape[1]
    one = slice(row, row + 1)
    alone = search("training", features[one], source[one, :length], language[one], **config)
    assert_same_hypotheses(alone, jax.tree.map(lambda x: x[one], together))


@pytest.mark.parametrize("width", [7, 8, 12])
def test_padding_columns_have_no_effect(width):
    features, source, language = inputs(model("training")[0])
    assert np.any(source[:, -1] != PAD)  # so the encoder cannot skip a column
    wanted = search("training", features, source, language)
    padded = np.pad(source, ((0, 0), (0, width - source.shape[1])), constant_values=PAD)
    assert_same_hypotheses(search("training", features, padded, language), wanted)


def test_cache_growth_has_no_effect():
    arguments = inputs(model("none")[0])
    wanted = search("none", *arguments)
    assert wanted.lengths.max() == LIMIT  # all parts are used
    assert_same_hypotheses(search("none", *arguments, growth=3), wanted)


def test_growing_cache_has_room_for_every_step():
    assert DecodeConfig(max_new_tokens=60, growth=4).parts == (15, 29, 44, 58)
    assert DecodeConfig(max_new_tokens=4, growth=4).parts == (1, 2)
    assert DecodeConfig(max_new_tokens=3).parts == (1,)


@pytest.fixture(scope="module")
def sixteen():
    """Inputs of sixteen examples, and the results in batches of three, which are never halved."""
    arguments = inputs(model("training")[0], batch=18)
    parts = [[x[i : i + 3] for x in arguments] for i in range(0, 18, 3)]
    found = [search("training", *part, beams=2, length_penalty=0.0) for part in parts]
    wanted = jax.tree.map(lambda *parts: np.concatenate(parts)[:16], *found)
    ends = np.sort(wanted.lengths.max(axis=1))
    assert ends[7] < ends[11] < ends[15]  # halved twice before the end
    return tuple(x[:16] for x in arguments), wanted


def test_shrinking_batch_has_no_effect(sixteen):
    arguments, wanted = sixteen
    found = search("training", *arguments, beams=2, length_penalty=0.0, growth=2, halvings=2)
    assert_same_hypotheses(found, wanted)


def test_search_on_eight_devices_matches_one(sixteen):
    arguments, wanted = sixteen
    translator, params = model("training")
    mesh = split_mesh()
    split = jax.device_put(params, match_rules(partition_rules(translator.config), params, mesh))
    batch = jax.NamedSharding(mesh, BATCH)
    config = settings(beams=2, length_penalty=0.0, growth=2, halvings=2)
    run = Search(translator, config).run
    with jax.set_mesh(mesh):
        compiled = jax.jit(run)
        found = compiled(split, *jax.device_put(arguments, batch))
    assert found.tokens.sharding.is_equivalent_to(batch, 3)
    assert_same_hypotheses(jax.device_get(found), wanted)


def test_no_example_moves_between_devices(sixteen):
    arguments, _ = sixteen
    translator, params = model("training")
    mesh = make_mesh(MeshConfig(data=8))
    config = settings(beams=2, growth=2, halvings=1)
    whole = jax.device_put(params, match_rules(partition_rules(translator.config), params, mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(Search(translator, config).run)
        split = jax.device_put(arguments, jax.NamedSharding(mesh, BATCH))
        text = compiled.lower(whole, *split).compile().as_text()
    moves = re.findall(r"= (.+?) ((?:all|collective|reduce)-[a-z-]+)\(", text)
    assert {name for _, name in moves} == {"all-reduce"}
    assert all(shape.startswith("pred[]") for shape, _ in moves)  # whether to continue


@pytest.fixture
def endless(monkeypatch):
    """Parameters with which no hypothesis ends before it must."""
    translator, params = model("none")
    bias = params["mbart"]["logits_bias"]
    monkeypatch.setitem(params["mbart"], "logits_bias", bias.at[END].set(-1e4))
    return translator, params


@pytest.mark.parametrize("limit", [3, LIMIT])
def test_end_token_at_the_limit_is_forced_at_no_cost(endless, limit):
    _, source, language = inputs(endless[0])
    found = search("none", None, source, language, max_new_tokens=limit, length_penalty=0.0)
    assert (found.lengths == limit).all()
    assert (found.scores > -1e4).all()  # every beam has words of its own
    best = np.full((len(source), LIMIT + 1), PAD, "int32")
    best[:, :limit] = found.tokens[:, 0, :limit]
    assert (best[:, 1] == language).all()
    forward.cache_clear()  # drops what was compiled with the usual parameters
    steps = np.asarray(forward("none")(None, source, best))
    forward.cache_clear()
    chosen = np.take_along_axis(steps[:, :-1], best[:, 1:, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(
        found.scores[:, 0], chosen[:, 1 : limit - 1].sum(axis=1), rtol=1e-5, atol=1e-5
    )


@functools.cache
def advance(config):
    return jax.jit(Search(model("original")[0], config).advance)


TWO_BEAMS = settings(beams=2)


@pytest.fixture(scope="module")
def begun():
    """A search, its inputs, its initial state and the scores of the next token."""
    translator, params = model("original")
    features, source, language = (None if x is None else jnp.asarray(x) for x in inputs(translator))
    steps = Search(translator, TWO_BEAMS)
    states = jax.jit(translator.encode)(params, source)
    state, logits = jax.jit(steps.start)(params, features, source, states, language)
    step = jax.jit(functools.partial(steps.step, params, source))
    return step, language, state, logits


def test_search_begins_with_one_beam_of_start_and_language(begun):
    _, language, state, logits = begun
    assert NEVER == -1e9
    assert int(state.length) == 2 and not state.done.any()
    np.testing.assert_array_equal(state.scores, [[0, NEVER]] * 3)
    np.testing.assert_array_equal(state.tokens[:, :, 0], START)
    np.testing.assert_array_equal(state.tokens[:, :, 1], np.stack([language] * 2, axis=1))
    np.testing.assert_array_equal(state.tokens[:, :, 2:], PAD)
    np.testing.assert_array_equal(state.finished.tokens, PAD)
    assert np.all(np.asarray(state.finished.scores) == -np.inf)
    np.testing.assert_array_equal(logits[:, 0], logits[:, 1])
    _, chosen = advance(TWO_BEAMS)(state, logits)
    assert not chosen.beams.any()


def test_finished_search_does_not_change(begun):
    step, _, state, logits = begun
    over = {}
    while int(state.length) < TWO_BEAMS.max_length:
        state, _ = advance(TWO_BEAMS)(state, logits)
        for row in np.flatnonzero(state.done):
            now = jax.tree.map(lambda x, row=row: np.asarray(x[row]), state.finished)
            jax.tree.map(np.testing.assert_array_equal, now, over.setdefault(row, now))
        if int(state.length) < TWO_BEAMS.max_length:
            state, logits = step(state)
    lengths = state.finished.lengths.max(axis=1)
    assert int(lengths.min()) < int(lengths.max())  # some finished before others
    assert len(over) == len(lengths)


def test_decode_defaults_are_the_published_ones():
    config = DecodeConfig()
    assert dataclasses.astuple(config) == (5, 60, 1.0, True, 64, 16, 2, 2)
    assert (config.max_length, config.steps) == (61, 58)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beams", 0),
        ("max_new_tokens", 2),
        ("batch", 0),
        ("bucket", 0),
        ("growth", 0),
        ("halvings", -1),
        ("length_penalty", 11.0),
    ],
)
def test_invalid_decode_settings_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"^{key}={value} must be "):
        DecodeConfig(**{key: value})
