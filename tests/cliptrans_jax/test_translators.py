"""Decoding, prefix and losses with a translator other than mBART: they rely only on the
protocol."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from meshes import idle_rules
from tiny import random_like

from cliptrans_jax.decode import DecodeConfig, Search
from cliptrans_jax.models import cliptrans
from cliptrans_jax.models.attention import CrossAttention, DecoderAttention
from cliptrans_jax.models.cliptrans import ModelConfig, Translator, partition_rules
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.runs.objective import make_loss
from cliptrans_jax.stages import STAGES, trainable
from cliptrans_jax.translators.nllb import NllbConfig
from cliptrans_jax.translators.table import TRANSLATORS
from cliptrans_jax.translators.translator import Architecture, Network, Readout, Sizes
from common_jax.config import Section
from common_jax.mesh import MeshConfig, make_mesh, match_rules

PAD, END, START, LIMIT = 0, 3, 4, 6


@dataclasses.dataclass(frozen=True)
class SmallConfig(Section):
    """Sizes and ids, none of them mBART's."""

    vocab: int = 16
    width: int = 8
    positions: int = 20
    pad: int = PAD
    eos: int = END
    start: int = START


def sinusoid(position, width):
    """(..., D): sines and cosines of the position, without parameters."""
    angles = position[..., None] / 100 ** (jnp.arange(width // 2) / (width // 2))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Small(nn.Module):
    """An encoder of embeddings with sinusoidal positions, a decoder with one pre-norm layer without
    an MLP, and an output matrix."""

    config: SmallConfig
    dtype: object

    def setup(self):
        sizes = self.config
        init = nn.initializers.normal(1.0)
        self.words = nn.Embed(sizes.vocab, sizes.width, embedding_init=init)
        self.head = self.param("head", init, (sizes.width, sizes.vocab))
        self.attention = DecoderAttention(sizes.width, 2, self.dtype)
        self.across = CrossAttention(sizes.width, 2, self.dtype)
        self.norm = nn.LayerNorm()

    def __call__(self, source, source_mask, target):
        visible = jnp.tril(jnp.ones((1, 1, *target.shape[1:] * 2), bool))
        states = self.encode(source, source_mask)
        return self.logits(self.decode(self.embed(target), states, source_mask, visible))

    def embed(self, ids):
        return self.words(ids)

    def encode(self, ids, mask, *, train=False):
        return self.embed(ids) + sinusoid(jnp.arange(ids.shape[1]), self.config.width)

    def decode(self, embeddings, states, states_mask, visible, *, train=False):
        return self.prefill(embeddings, states, states_mask, visible)[0]

    def logits(self, hidden):
        return jnp.asarray(hidden @ self.head, jnp.float32)

    def prefill(self, embeddings, states, states_mask, visible):
        x = embeddings + sinusoid(jnp.arange(embeddings.shape[1]), self.config.width)
        own, memory = self.attention(self.norm(x), visible)
        x, source = x + own, self.across.remember(states)
        x = x + self.across.recall(self.norm(x), source, states_mask[:, None, None, :])
        return x, ((memory, source),)

    def extend(self, embeddings, cache, slot, position, visible, states_mask):
        ((memory, source),) = cache
        x = embeddings + sinusoid(position, self.config.width)
        own, memory = self.attention.extend(self.norm(x), memory, slot, visible)
        x = x + own
        x = x + self.across.recall(self.norm(x), source, states_mask[:, None, None, :])
        return x, ((memory, source),)


def start_first(labels, sizes):
    """M2M-100's shift: the start token, then all labels but the last."""
    labels = jnp.where(labels < 0, sizes.pad, labels)
    return jnp.concatenate([jnp.full_like(labels[:, :1], sizes.start), labels[:, :-1]], axis=1)


def language_last(ids, sizes):
    """The first mBART's source format: the language code after the end token."""
    after = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=sizes.pad)
    length = jnp.sum(ids != sizes.pad, axis=1, keepdims=True)
    return jnp.where(jnp.arange(ids.shape[1]) == length - 1, ids[:, :1], after)


SMALL = Architecture(
    name="small",
    subtree="small",
    config=SmallConfig,
    network=Small,
    rules=((r"/(words/embedding|head)$", P(None, "fsdp")), (r"/(kernel|bias|scale)$", P())),
    encoder_input=language_last,
    decoder_input=start_first,
    embedding="words/.*",
    encoder="nothing/.*",
    readout=lambda params: Readout(params["head"].T),
    kind="small",
    tokenizer="trained",
)


@dataclasses.dataclass(frozen=True)
class SmallModel(ModelConfig):
    """A translation model with a config section for the second translator."""

    small: SmallConfig = SmallConfig()


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(cliptrans, "TRANSLATORS", {**TRANSLATORS, "small": SMALL})


NLLB = NllbConfig(
    vocab=16,
    width=8,
    encoder_layers=1,
    decoder_layers=2,
    encoder_heads=2,
    decoder_heads=2,
    encoder_hidden=12,
    decoder_hidden=12,
    positions=20,
    pad=PAD,
    eos=END,
    start=START,
)


@functools.cache
def model(count, name="small"):
    """A translator with a prefix of length `count`, and its parameters."""
    mapper = MapperConfig(prefix=count, features=5)
    translator = Translator(SmallModel(mapper=mapper, translator=name, nllb=NLLB))
    if name == "small":
        return translator, translator.init(jax.random.key(1))
    return translator, random_like(jax.eval_shape(translator.init, jax.random.key(1)))


def inputs(count, batch=4):
    rng = np.random.default_rng(0)
    source = rng.integers(5, 16, (batch, 5)).astype("int32")
    source[1, 3:] = source[3, 2:] = PAD
    features = jnp.asarray(rng.normal(size=(batch, 5)), "float32") if count else None
    return features, jnp.asarray(source), jnp.asarray(rng.integers(5, 8, batch), "int32")


def test_small_network_satisfies_the_protocol():
    translator, params = model(2)
    assert isinstance(translator.network, Network) and isinstance(translator.config.sizes, Sizes)
    assert set(params) == {"small", "mapper"}
    assert translator.readout(params).matrix.shape == (16, 8)
    assert translator.config.key == "config.model.small"


def test_encoder_reads_tokens_in_the_order_of_the_record():
    translator, params = model(0)
    framed = jnp.asarray([[5, 9, 8, END], [6, 7, END, PAD]], "int32")
    read = jnp.asarray([[9, 8, END, 5], [7, END, 6, PAD]], "int32")
    states = translator.call("encode", params, read, read != PAD)
    np.testing.assert_array_equal(translator.encode(params, framed), states)
    assert np.abs(states - translator.call("encode", params, framed, read != PAD)).max() > 0


@pytest.mark.parametrize(("name", "count"), [("small", 0), ("small", 3), ("nllb", 3)])
def test_greedy_decoding_takes_the_argmax_of_training_logits(name, count):
    translator, params = model(count, name)
    features, source, language = inputs(count)
    search = Search(translator, DecodeConfig(beams=1, max_new_tokens=LIMIT, growth=2, halvings=1))
    run = jax.jit(search.run)
    found = jax.device_get(run(params, features, source, language))
    labels = np.full((len(source), LIMIT + 1), PAD, "int32")
    for row, ids, length in zip(labels, found.tokens[:, 0], found.lengths[:, 0], strict=True):
        row[: length - 1], row[length - 1] = ids[1:length], END
    score = jax.jit(translator.train_logits)
    best = np.asarray(score(params, features, source, jnp.asarray(labels))).argmax(axis=-1)
    assert (found.tokens[:, 0, 0] == START).all()
    np.testing.assert_array_equal(labels[:, 0], language)
    for row, chosen, length in zip(labels, best, found.lengths[:, 0], strict=True):
        chosen_freely = slice(1, length if length < LIMIT else LIMIT - 1)  # then the end is forced
        assert chosen[chosen_freely].tolist() == row[chosen_freely].tolist()
    assert len({tuple(row) for row in labels}) > 1


@pytest.mark.parametrize("name", ["small", "nllb"])
def test_loss_has_gradients_for_every_trained_parameter(name):
    translator, params = model(3, name)
    features, source, language = inputs(3)
    labels = jnp.stack([language, language + 3, jnp.full_like(language, END)], axis=1)
    batch = {"features": features, "source": source, "labels": labels}
    loss = make_loss(translator, None, label_smoothing=0.1)

    def value(params):
        return loss(params, {}, batch, {"dropout": jax.random.key(0)}, 0)[0]

    slopes = jax.jit(jax.grad(value))(params)
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
        assert np.isfinite(slope).all() and np.abs(slope).max() > 0, path


def test_record_determines_freezing_and_sharding():
    translator, params = model(3)
    caption = trainable(STAGES["caption"], "encoder", SMALL)
    assert re.fullmatch(caption, "small/head") and re.fullmatch(caption, "mapper/out/kernel")
    assert not re.fullmatch(caption, "small/words/embedding")
    assert re.fullmatch(trainable(STAGES["translate"], "encoder", SMALL), "small/words/embedding")
    rules = partition_rules(translator.config)
    shardings = match_rules(rules, params, make_mesh(MeshConfig(fsdp=8)))
    assert tuple(shardings["small"]["words"]["embedding"].spec) == (None, "fsdp")
    assert not [regex for regex in idle_rules(rules, params) if "small" in regex]
