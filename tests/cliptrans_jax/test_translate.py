"""Search outputs as texts, in order, and each stage's search settings."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from etils import epath
from jax import numpy as jnp
from meshes import one_device, split_mesh
from tiny_cliptrans import ENGLISH, FEATURES, GERMAN, PREFIX, TEST, number_tokenizer, tiny_config

from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.data.examples import Examples, NoiseConfig
from cliptrans_jax.data.feed import Inputs
from cliptrans_jax.decode import Hypotheses
from cliptrans_jax.encoders import TextTower
from cliptrans_jax.evaluators import labels
from cliptrans_jax.evaluators import translation as scored_by
from cliptrans_jax.evaluators.evaluator import evaluate_all
from cliptrans_jax.evaluators.scores import score
from cliptrans_jax.evaluators.show import Hypothesis
from cliptrans_jax.evaluators.translation import (
    SentenceSet,
    Translate,
    best_texts,
    evaluate_translations,
    make_translate,
)
from cliptrans_jax.models.cliptrans import Translator
from cliptrans_jax.runs import translation
from cliptrans_jax.runs.run_data import Split
from cliptrans_jax.runs.scoring import decode_batches
from cliptrans_jax.runs.translation import Model, validate
from cliptrans_jax.stages import Side

START, PAD, EOS = 2, 1, 2
NUMBERS = number_tokenizer(limit=20)


@dataclasses.dataclass(frozen=True)
class Echo:
    """A search that returns the source's words after the language, and then fewer of them. Tokens
    after an output's length are not pads. Every second example has a third output.

    Scores are the sum of the example's feature and its language.
    """

    def run(self, params, features, source, language):
        words = source[:, 1:]
        count = jnp.sum(words > 3, axis=1)
        head = jnp.stack([jnp.full_like(language, START), language], axis=1)
        tokens = jnp.concatenate([head, jnp.where(words > 3, words, 9)], axis=1)
        base = language + params["more"] + (0 if features is None else features[:, 0])
        third = jnp.where(count % 2 == 0, base - 2.0, -jnp.inf)
        return Hypotheses(
            tokens=jnp.repeat(tokens[:, None], 3, axis=1),
            lengths=jnp.stack([count + 2, count + 1, jnp.full_like(count, 3)], axis=1),
            scores=jnp.stack([base, base - 1.0, third], axis=1),
        )


def batch_of(index, mask, lengths):
    """Example i has the source "10+i 11+i ..." and the feature i / 8."""
    size = len(index)
    source = np.full((size, 8), PAD, np.int32)
    for row, (i, length) in enumerate(zip(index, lengths, strict=True)):
        source[row, : length + 2] = [ENGLISH, *range(10 + i, 10 + i + length), EOS]
    return {
        "source": source,
        "labels": np.tile(np.array([GERMAN, 4, EOS], np.int32), (size, 1)),
        "features": np.asarray(index, np.float32)[:, None] / 8,
        "_mask": np.asarray(mask, np.float32),
        "_index": np.asarray(index, np.int32),
    }


BATCHES = (
    batch_of([3, 0, 5, 1, 9, 2, 8, 4], [1] * 8, [3, 2, 1, 4, 2, 5, 1, 3]),
    batch_of([7, 6, 6, 6, 6, 6, 6, 6], [1, 1, 0, 0, 0, 0, 0, 0], [2, 3] + [3] * 6),
)
LENGTHS = {3: 3, 0: 2, 5: 1, 1: 4, 9: 2, 2: 5, 8: 1, 4: 3, 7: 2, 6: 3}


@pytest.mark.parametrize("mesh", [one_device, split_mesh])
@pytest.mark.parametrize("language", [None, ENGLISH])
def test_each_example_has_its_own_outputs_best_first(mesh, language):
    def features(params, batch):
        return 2 * batch["features"]

    translate = make_translate(Echo(), features, NUMBERS, mesh=mesh(), language=language)
    found = translate({"more": jnp.float32(0.5)}, BATCHES)
    assert sorted(found) == list(range(10))
    for index, outputs in found.items():
        count = LENGTHS[index]
        words = [str(10 + index + place) for place in range(count)]
        best = (GERMAN if language is None else language) + 0.5 + 2 * index / 8
        wanted = [(words, best), (words[:-1], best - 1), (words[:1], best - 2)]
        wanted = wanted[: 2 if count % 2 else 3]  # the others have no third output
        assert [(one.text.split(), one.score) for one in outputs] == wanted
    assert best_texts(found, 10) == [found[index][0].text for index in range(10)]


def test_model_without_prefix_needs_no_features():
    translate = make_translate(Echo(), lambda *_: None, NUMBERS, mesh=one_device())
    found = translate({"more": jnp.float32(0)}, BATCHES[:1])
    assert {outputs[0].score for outputs in found.values()} == {GERMAN}
    assert translate({"more": jnp.float32(0)}, []) == {}


# Search settings of a stage.


def model_of(stage, tower=None, **changes):
    config = dataclasses.replace(tiny_config(stage, None), **changes)
    return Model(config, Translator(config.model, config.dtype), tower)


@pytest.mark.parametrize(
    ("stage", "parity", "language"),
    [("caption", False, None), ("caption", True, GERMAN), ("translate", True, None)],
)
@pytest.mark.parametrize(("beams", "wanted"), [(0, 2), (1, 1), (4, 4)])
def test_search_settings_of_each_stage(stage, parity, language, beams, wanted, monkeypatch):
    """With `parity`, captions, although English, start with the target language's code."""
    made = []

    def make(search, features, tokenizer, **settings):
        made.append((search, settings))

    monkeypatch.setattr(translation, "make_translate", make)
    model = model_of(stage, parity=parity)
    data = types.SimpleNamespace(tokenizer=NUMBERS, mesh=one_device())
    model.translate(data, beams=beams)
    ((search, settings),) = made
    assert settings == {"mesh": data.mesh, "language": language}
    assert search.config == dataclasses.replace(model.config.decode, beams=wanted)
    assert search.translator is model.translator


def tower():
    return TextTower.described(tiny_config("translate", None).clip.text, jnp.float32)


# Source, labels, features and tower tokens of a batch of 6 examples in 2 micro-batches.
@pytest.mark.parametrize(
    ("stage", "changes", "with_tower", "wanted"),
    [
        ("caption", {}, False, {"source": 2, "labels": 9, "features": FEATURES}),
        ("text_recon", {}, True, {"source": 2, "labels": 9, "clip_tokens": 9}),
        (
            "caption",
            {"noise": NoiseConfig(mask_prob=0.5)},
            False,
            {"source": 9, "labels": 9, "features": FEATURES},
        ),
        ("translate", {}, False, {"source": 9, "labels": 9, "features": FEATURES}),
        (
            "translate",
            {"noise": NoiseConfig(train=True)},
            False,
            {"source": 2, "labels": 9, "features": FEATURES},
        ),
        (
            "translate",
            {"noise": NoiseConfig(test=True)},
            True,
            {"source": 9, "labels": 9, "clip_tokens": 9},
        ),
        (  # the tower only encodes the sentences of an evaluation
            "triplet",
            {"keep_text_features": False},
            True,
            {"source": 9, "labels": 9, "features": FEATURES},
        ),
    ],
)
def test_step_is_compiled_for_the_batch_of_its_stage(stage, changes, with_tower, wanted):
    optim = dataclasses.replace(tiny_config(stage, None).optim, batch=6, accumulate=2)
    model = model_of(stage, tower() if with_tower else None, optim=optim, **changes)
    task = model.bare_task(one_device(), examples=21, tokens=9)
    assert {name: x.shape for name, x in task.batch.items()} == {
        name: (3, width) for name, width in wanted.items()
    }
    assert task.steps_per_epoch == 21 // 6
    longer = model.bare_task(one_device(), examples=21, tokens=99).batch
    assert longer["labels"].shape == (3, 20)  # config.tokenizer.max_length
    if "clip_tokens" in wanted:
        assert longer["clip_tokens"].shape == (3, 30)  # its 32 positions minus 2


@pytest.mark.parametrize("lower", [False, True])
def test_lower_case_model_is_tracked_by_bleu_lower(lower):
    tokenizer = dataclasses.replace(tiny_config("translate", None).tokenizer, lower=lower)
    task = model_of("translate", None, tokenizer=tokenizer).bare_task(one_device(), examples=21)
    assert ("val/bleu_lower" in task.shown, "val/bleu" in task.shown) == (lower, not lower)


@pytest.mark.parametrize(
    ("stage", "changes", "runs"),
    [
        ("translate", {}, False),
        ("translate", {"keep_text_features": False}, True),
        ("translate", {"unfreeze_clip": True}, True),
        ("caption", {"keep_text_features": False}, False),
        ("triplet", {"keep_text_features": False}, True),  # only in evaluation
    ],
)
def test_model_has_a_text_tower_if_its_step_runs_one(stage, changes, runs):
    config = dataclasses.replace(tiny_config(stage, None), **changes)
    data = types.SimpleNamespace(tokenizer=NUMBERS, text_tower="the tower")
    assert Model.of(config, data).tower == ("the tower" if runs else None)
    data.tokenizer = dataclasses.replace(NUMBERS, vocab=301)
    with pytest.raises(ValueError, match=r"config\.model\.mbart\.vocab=300 is less than the 301"):
        Model.of(config, data)


@pytest.mark.parametrize("unfreeze", [False, True])
def test_text_tower_is_trained_or_a_helper(unfreeze):
    model = model_of("translate", tower(), unfreeze_clip=unfreeze)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert set(shapes) == {"mbart", "mapper"} | ({"clip"} if unfreeze else set())
    helpers = model.frozen_shapes(one_device())
    assert set(helpers) == (set() if unfreeze else {"clip"})
    assert (model.trained_tower is None) is not unfreeze
    assert model_of("translate").frozen_shapes(one_device()) == {}


# Validation.

TEXTS = {"en": ("10 11", "12", "13 14 15"), "de": ("20 21 22 23", "24 25 26 27", "30 31 32 33")}


def set_of(pair):
    ids = {code: NUMBERS.encode(texts, code) for code, texts in TEXTS.items()}
    examples = Examples(
        source=ids[pair[0]],
        target=ids[pair[1]],
        side=Side.TEXT,
        rows=np.arange(3, dtype=np.int32),
        languages=(pair,) * 3,
        drops=False,
    )
    features = np.zeros((3, FEATURES), np.float32)
    room = 32 - PREFIX
    return Split(
        Corpus("numbers", TEXTS, None, ("a", "b", "c")), Inputs(examples, features, None, 1, room)
    )


def sentences(split, translate):
    """A set of sentences that `translate` searches, without a model."""
    config = tiny_config("translate", None)
    return SentenceSet(
        translator=None,
        encode=None,
        batches=None,
        mesh=one_device(),
        seed=0,
        translate=translate,
        search_batches=lambda: decode_batches(config, split.inputs),
        references=[split.reference(index) for index in range(3)],
        language=split.inputs.examples.languages[0][1],
    )


def searched(pair):
    """An evaluation whose search returns three outputs, of which only the second is right."""
    seen = []

    def translate(params, batches):
        seen.append((params, list(batches)))
        outputs = [Hypothesis("1 2 3 4", -1.0), Hypothesis("9", -2.0)]
        right = Hypothesis(TEXTS[pair[1]][1], -0.5)
        return {2: outputs, 0: outputs, 1: [right, outputs[0]]}

    return evaluate_translations(sentences(set_of(pair), translate)), seen


def test_scores_use_the_best_outputs():
    evaluate, seen = searched(("en", "de"))
    found = evaluate({"a": 1.0}, {"b": 10.0}, 100)
    assert found["exact"] == pytest.approx(100 / 3)
    outputs = ["1 2 3 4", TEXTS["de"][1], "1 2 3 4"]
    assert found["chrf"] == pytest.approx(score(outputs, TEXTS["de"], language="de").chrf)
    ((params, batches),) = seen
    assert params == {"a": 1.0, "b": 10.0}
    assert sorted(batches[0]["_index"][batches[0]["_mask"] > 0].tolist()) == [0, 1, 2]


def test_outputs_without_a_finite_score_raise_an_error():
    tokens, lengths = np.full((2, 2, 3), 4), np.full((2, 2), 3)
    scores = np.array([[-1.0, np.nan], [np.nan, -np.inf]])
    hypotheses = types.SimpleNamespace(tokens=tokens, lengths=lengths, scores=scores)
    read = Translate(None, NUMBERS, one_device())._read
    found = read(hypotheses, np.array([7, 3]), np.array([1.0, 0.0]))
    assert [len(outputs) for outputs in found.values()] == [1] and list(found) == [7]
    with pytest.raises(FloatingPointError, match=r"logits for sentence 3, .* are not finite"):
        read(hypotheses, np.array([7, 3]), np.array([1.0, 1.0]))


def test_evaluators_are_combined_into_one():
    def loss(params, helpers, step):
        return {"loss": params["a"] + helpers["b"] + step}

    evaluate = evaluate_all([loss, lambda params, helpers, step: {"exact": 50.0}])
    assert evaluate({"a": 1.0}, {"b": 10.0}, 100) == {"loss": 111.0, "exact": 50.0}


@pytest.mark.parametrize(("pair", "language"), [(("en", "de"), "de"), (("en", "en"), "en")])
def test_scores_use_the_output_language(pair, language, monkeypatch):
    asked = []

    def record(outputs, references, *, language):
        asked.append((tuple(references), language))
        return score(outputs, references, language=language)

    monkeypatch.setattr(scored_by, "score", record)
    searched(pair)[0]({}, {}, 0)
    assert asked == [(TEXTS[language], language)]


@pytest.mark.parametrize("decode", [True, False])
def test_validation_follows_the_config(decode, monkeypatch):
    made = []
    monkeypatch.setattr(
        labels, "make_evaluator", lambda _, *given, **more: made.append((given, more))
    )
    monkeypatch.setattr(translation, "evaluate_all", lambda evaluations: evaluations)
    config = tiny_config("translate", None)
    model = model_of(
        "translate",
        optim=dataclasses.replace(config.optim, batch=4, accumulate=2),
        run=dataclasses.replace(config.run, best="val/token_accuracy"),
        valid_decode=decode,
        seed=7,
    )
    valid = set_of(("en", "de"))
    valid = Split(
        valid.corpus,
        dataclasses.replace(
            valid.inputs, examples=dataclasses.replace(valid.inputs.examples, drops=True)
        ),
    )
    found = validate(model.config, model, valid, None, mesh=one_device())
    assert len(found) == 1 + decode
    (((batches,), settings),) = made
    assert settings["seed"] == 7
    rows = list(batches())
    assert [batch["_mask"].tolist() for batch in rows] == [[1, 1], [1, 0]]  # micro-batches
    assert [batch["source"].shape for batch in rows] == [(2, 2)] * 2  # only special tokens are left


# A whole run, except for its training.


def test_training_selection_and_scoring_use_separate_splits(corpus, tmp_path, monkeypatch):
    seen = {}

    def train(task, run, optim, **settings):
        seen.update(task=task, **settings)
        return {"steps": 6}

    def load(step, **settings):
        seen.update(loaded=step, average=settings["average"])
        return {"mbart": "averaged"}

    def scored(config, workdir, chosen, translate, params, *, step):
        return (chosen.corpus.name, translate, params, step)

    monkeypatch.setattr(translation.loop, "train", train)
    monkeypatch.setattr(translation.checkpoint, "load", load)
    monkeypatch.setattr(translation, "best_step", lambda _, run: epath.Path(f"/{run.best}/3"))
    monkeypatch.setattr(translation, "score_split", scored)
    monkeypatch.setattr(
        translation, "validate", lambda config, model, valid, guess, *, mesh: (valid, guess)
    )
    monkeypatch.setattr(Model, "translate", lambda self, data, *, beams=0: f"{beams} beams")
    config = tiny_config("translate", corpus)
    network = dataclasses.replace(config.model.mapper, prefix=0)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mapper=network),
        optim=dataclasses.replace(config.optim, batch=8, accumulate=2, ema=0.5),
        noise=NoiseConfig(mask_prob=0.5, train=True),
        parity=True,
        seed=7,
        valid_beams=1,
    )
    result = translation.run(config, epath.Path(tmp_path / "run"), one_device())
    name = f"multi30k {TEST}"
    assert result == {"steps": 6, "test": (name, "0 beams", {"mbart": "averaged"}, "3")}
    assert str(seen["loaded"]) == "/val/bleu/3" and seen["average"]
    assert (seen["seed"], seen["config"]) == (7, config)  # as requested
    task = seen["task"]
    assert (task.title, task.steps_per_epoch, task.warm_start) == ("translate", 3, None)
    assert task.batch["labels"].shape == (4, 20)
    feed = task.batches.__self__
    assert (feed.batch, feed.seed, feed.noise, feed.batching) == (
        8, 7, config.noise, config.batching,
    )  # fmt: skip
    assert len(feed.inputs) == 24 and feed.inputs.examples.drops
    valid, translate = task.evaluators["val"]
    assert (valid.corpus.name, translate) == ("multi30k val", "1 beams")
    assert not valid.inputs.examples.drops
    assert (tmp_path / "run" / "tokenizer.json").exists()
