"""The stages' losses and sums worked out by hand, their keys and helpers."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from meshes import one_device
from tiny_cliptrans import tiny_config

from cliptrans_jax.evaluators.labels import make_sums
from cliptrans_jax.models.cliptrans import Translator
from cliptrans_jax.runs import objective, translation
from cliptrans_jax.runs.objective import (
    make_encode,
    make_loss,
)
from cliptrans_jax.stages import TRANSLATION_STAGES
from cliptrans_jax.translators.translator import Readout
from common_jax.state import partition

MODEL = tiny_config("translate", None).model
PAD, VOCAB = 1, 9
DRAW = np.random.default_rng(0)
LABELS = np.array([[8, 4, 5, 6, 2], [8, 7, 2, PAD, PAD], [8, 2, PAD, PAD, PAD]], np.int32)
REAL = LABELS != PAD
BATCH = {
    "source": jnp.zeros((3, 4), jnp.int32),
    "labels": jnp.asarray(LABELS),
    "features": jnp.asarray(DRAW.normal(size=(3, VOCAB)), jnp.float32),
}
PARAMS = {
    "states": jnp.asarray(DRAW.normal(size=(3, 5, VOCAB)), jnp.float32),
    "readout": {"bias": jnp.asarray(DRAW.normal(size=VOCAB), jnp.float32)},
}


class Model:
    """Stands in for a Translator: its logits are states, the example's features and a bias."""

    config, dtype = MODEL, jnp.float32

    def __init__(self):
        self.keys = []

    def label_states(self, params, features, source, labels, *, dropout=None):
        self.keys.append(dropout)
        return params["states"] + features[:, None]

    def readout(self, params):
        return Readout(2.0 * jnp.eye(VOCAB), params["readout"]["bias"])

    def call(self, method, params, states):
        assert method == "logits"
        return 2.0 * states + params["readout"]["bias"]


def log_p(features=BATCH["features"]):
    """Log-probabilities of every token at every position, in numpy."""
    states = np.asarray(PARAMS["states"] + features[:, None], np.float64)
    logits = 2.0 * states + np.asarray(PARAMS["readout"]["bias"])
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def of_labels(values):
    return np.take_along_axis(values, LABELS[..., None], axis=-1)[..., 0]


def rngs(seed=0):
    return {"dropout": jax.random.key(seed)}


# The loss.


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk", [2, 1024])
def test_loss_is_the_mean_over_the_tokens_of_the_batch(smoothing, chunk):
    loss = make_loss(Model(), None, label_smoothing=smoothing, chunk=chunk)
    found, metrics = loss(PARAMS, {}, BATCH, rngs(), 0)
    each = -(1 - smoothing) * of_labels(log_p()) - smoothing * log_p().mean(axis=-1)
    assert REAL.sum() == 10  # neither 3 sentences nor 15 positions
    assert float(found) == pytest.approx(each[REAL].sum() / 10, rel=1e-5)
    assert metrics == {}


def test_loss_computes_logits_in_the_configured_chunks(monkeypatch):
    asked = []

    def states_loss(*given, **settings):
        asked.append(settings)
        return jnp.float32(6), jnp.float32(3)

    monkeypatch.setattr(objective, "states_loss", states_loss)
    loss = make_loss(Model(), None, label_smoothing=0.2, chunk=7)
    assert float(loss(PARAMS, {}, BATCH, rngs(), 0)[0]) == 2
    assert asked == [{"pad": PAD, "smoothing": 0.2, "chunk": 7}]


def test_batch_of_pads_has_zero_loss():
    batch = BATCH | {"labels": jnp.full((3, 5), PAD)}
    loss = make_loss(Model(), None, label_smoothing=0.1)
    assert float(loss(PARAMS, {}, batch, rngs(), 0)[0]) == 0


def test_training_uses_the_dropout_key():
    model = Model()
    make_loss(model, None, label_smoothing=0.0)(PARAMS, {}, BATCH, rngs(5), 0)
    (key,) = model.keys
    np.testing.assert_array_equal(*map(jax.random.key_data, (key, jax.random.key(5))))


# The sums of an evaluation.


def sums(mask, params=PARAMS, **settings):
    model = Model()
    found = make_sums(model, make_encode(None), **settings)(
        params, {}, BATCH | {"_mask": jnp.asarray(mask, jnp.float32)}, jax.random.key(0)
    )
    assert model.keys == [None]  # no dropout
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("mask", [(1, 1, 1), (1, 0, 1), (0, 1, 0)])
def test_evaluation_sums_over_the_tokens_of_real_examples(mask):
    real = REAL & np.array(mask, bool)[:, None]
    found = sums(mask)
    assert found["count"] == real.sum()
    assert found["loss"] == pytest.approx(-of_labels(log_p())[real].sum(), rel=1e-5)
    assert found["token_accuracy"] == (log_p().argmax(axis=-1) == LABELS)[real].sum()


def test_evaluation_does_not_depend_on_the_chunk():
    assert sums((1, 0, 1), chunk=1) == pytest.approx(sums((1, 0, 1)), rel=1e-6)


@pytest.mark.parametrize(("token", "count"), [(8, 3), (2, 3), (7, 1), (PAD, 0), (0, 0)])
def test_token_accuracy_counts_highest_scores_except_pads(token, count):
    """The bias makes every guess the same token; pads do not count as guesses."""
    readout = {"bias": jnp.zeros(VOCAB).at[token].set(100.0)}
    assert sums((1, 1, 1), PARAMS | {"readout": readout})["token_accuracy"] == count


# Features of a text tower in the step.


class Tower:
    """Features are the sum of a sentence's ids times a factor; records the keys it gets."""

    def __init__(self):
        self.keys = []

    def apply(self, params, ids, *, dropout=None):
        self.keys.append(dropout)
        return params["factor"] * jnp.sum(ids, axis=1, keepdims=True) * jnp.arange(1.0, 1 + VOCAB)


CLIP = {"clip": {"factor": jnp.float32(0.01)}}
TEXTS = {name: x for name, x in BATCH.items() if name != "features"} | {
    "clip_tokens": jnp.asarray([[0, 5, 2], [0, 9, 2], [0, 4, 2]], jnp.int32)
}
SUMMED = jnp.float32([[0.07], [0.11], [0.06]]) * jnp.arange(1.0, 1 + VOCAB)


def test_features_come_from_the_batch_or_the_tower():
    assert make_encode(None)(PARAMS, {"source": BATCH["source"]}) is None
    assert make_encode(None)(PARAMS, BATCH) is BATCH["features"]
    np.testing.assert_allclose(make_encode(Tower())(CLIP, TEXTS), SUMMED, rtol=1e-6)


@pytest.mark.parametrize("trains", [False, True])
def test_tower_uses_dropout_only_if_trained(trains):
    trained, helpers = (PARAMS | CLIP, {}) if trains else (PARAMS, CLIP)
    tower = Tower()
    loss = make_loss(Model(), tower, label_smoothing=0.0)
    for seed in (0, 1):
        found, _ = loss(trained, helpers, TEXTS, rngs(seed), 0)
        wanted = -of_labels(log_p(SUMMED))[REAL].mean()
        assert float(found) == pytest.approx(wanted, rel=1e-5)
    if not trains:
        assert tower.keys == [None, None]
        return
    # A separate key, which depends on the step's.
    keys = {tuple(jax.random.key_data(key).tolist()) for key in (*tower.keys, jax.random.key(0))}
    assert len(keys) == 3


@pytest.mark.parametrize("trains", [False, True])
def test_evaluation_takes_the_tower_from_parameters_or_helpers(trains):
    trained, helpers = (PARAMS | CLIP, {}) if trains else (PARAMS, CLIP)
    tower, batch = Tower(), TEXTS | {"_mask": jnp.ones(3)}
    found = make_sums(Model(), make_encode(tower))(trained, helpers, batch, jax.random.key(0))
    wanted = -of_labels(log_p(SUMMED))[REAL].sum()
    assert float(found["loss"]) == pytest.approx(wanted, rel=1e-5)
    assert tower.keys == [None]


# Which weights a stage trains.

HELD = {
    "encoder": ("mbart/encoder/", "mbart/embedding", "mbart/logits_bias"),
    "encoder_layers": ("mbart/encoder/", "mbart/logits_bias"),
    "nothing": ("mbart/logits_bias",),
}


@pytest.mark.parametrize("freeze", HELD)
@pytest.mark.parametrize("stage", TRANSLATION_STAGES)
def test_trained_parameters_of_each_stage(stage, freeze):
    """In captioning: the mapper, and the decoder's positions, norms and layers."""
    config = dataclasses.replace(tiny_config(stage, None), freeze=freeze)
    model = translation.Model(config, Translator(config.model), None)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    task = model.bare_task(one_device(), examples=24)
    trained, fixed = (
        set(traverse_util.flatten_dict(dict(tree), sep="/"))
        for tree in partition(shapes, task.trainable)
    )
    captions = stage in ("caption", "text_recon")
    held = HELD[freeze] if captions else ("mbart/logits_bias",)
    assert fixed == {path for path in trained | fixed if path.startswith(held)}
    assert {path.split("/")[0] for path in trained} == {"mbart", "mapper"}
    assert any(path.startswith("mbart/decoder/positions") for path in trained)
    assert any(path.startswith("mbart/encoder/") for path in fixed) is (
        captions and freeze != "nothing"
    )
