"""The towers: one feature per example, in the order of the examples, cached by their inputs."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from meshes import one_device, split_mesh
from tiny import fill
from tiny_cliptrans import draw, tiny_config

from cliptrans_jax import encoders
from cliptrans_jax.data.corpus import Corpus, FolderImages
from cliptrans_jax.data.examples import pad
from cliptrans_jax.data.pictures import prepare_picture
from cliptrans_jax.data.tokenizers.framing import FramedTokenizer
from cliptrans_jax.encoders import ImageTower, TextTower, image_features, text_features
from cliptrans_jax.towers.clip import ClipText, ClipTextConfig, ClipVision
from cliptrans_jax.towers.mclip import MClip, MClipConfig
from common_jax.nn.dense import matmul_precision

NAMES = ("b.png", "a.png", "b.png", "c.png", "a.png", "b.png")
DRAWN = {"a.png": "a red square", "b.png": "a blue cross", "c.png": "a green bar above"}


@dataclasses.dataclass(frozen=True)
class Watched(FolderImages):
    """Records in `reads` which pictures are read."""

    reads: list = dataclasses.field(default_factory=list)

    def __getitem__(self, index):
        self.reads.append(self.names[index])
        return super().__getitem__(index)


@pytest.fixture
def tower():
    config = tiny_config("caption", None).clip.image
    params = ClipVision(config, jnp.float32).init(
        jax.random.key(0), jnp.zeros((1, config.image, config.image, 3))
    )["params"]
    return ImageTower(config, params, jnp.float32)


@pytest.fixture
def corpus(tmp_path):
    for name, text in DRAWN.items():
        draw(text).save(tmp_path / name)
    texts = {"en": tuple(f"caption {number}" for number in range(len(NAMES)))}
    return Corpus("shapes", texts, Watched(tmp_path, NAMES), NAMES)


def encode(tower, corpus, folder, **settings):
    mesh = one_device()
    return image_features(tower, corpus, folder=folder, mesh=mesh, **settings)


def test_shared_image_is_encoded_and_stored_once(tower, corpus, tmp_path):
    found = encode(tower, corpus, tmp_path / "features")
    pictures = [prepare_picture(np.asarray(draw(DRAWN[name])), 16) for name in NAMES]
    wanted = tower.apply(tower.params, jnp.stack(pictures))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    with np.load(tmp_path / "features" / "shapes.pictures.npz") as kept:
        assert kept["features"].shape == (len(DRAWN), found.shape[1])
    assert corpus.images.reads.count("a.png") == 1
    again = encode(tower, corpus, tmp_path / "features")
    np.testing.assert_array_equal(found, again)


def test_another_order_is_another_set(tower, corpus, tmp_path):
    """The same pictures in another order, with the same features folder."""
    found = encode(tower, corpus, tmp_path / "features")
    names = NAMES[::-1]
    turned = dataclasses.replace(corpus, images=FolderImages(tmp_path, names), keys=names)
    np.testing.assert_allclose(encode(tower, turned, tmp_path / "features"), found[::-1], atol=1e-6)


def test_reading_in_a_worker_process_changes_nothing(tower, corpus, tmp_path):
    here = encode(tower, corpus, tmp_path / "here")
    corpus.images.reads.clear()
    there = encode(tower, corpus, tmp_path / "there", workers=1)
    np.testing.assert_array_equal(here, there)
    # The others are read here too: for the fingerprint, and to pad a batch.
    assert "a.png" not in corpus.images.reads


# Texts.

PAD, ROOM = 1, 12
SIZES = {"vocab": 60, "width": 8, "layers": 1, "heads": 2, "hidden": 8, "features": 4}
CONFIGS = {
    "mclip": MClipConfig(positions=ROOM + 2, **SIZES),
    "clip": ClipTextConfig(positions=ROOM, **SIZES),
}
# Token counts of sentences, special tokens included. The order by length, 1 4 3 0 5 2, is not its
# own inverse.
LENGTHS = (6, 3, 11, 4, 3, 9)
TEXTS = {
    "en": ("4 5 6 7", "8", "9 10 11 12 13 14 15 16 17", "18 19", "20", "21 22 23 24 25 26 27"),
    "de": ("31", "32 33 34", "35 36", "37", "38 39", "40"),
}


def numbers(bos=0, eos=2):
    """A tokenizer whose words are numbers: "7" is token 7."""
    return FramedTokenizer(
        cut=lambda texts: [[int(word) for word in text.split()] for text in texts],
        join=lambda ids: " ".join(map(str, ids)),
        definition=lambda: b"words are ids",
        vocab=60,
        language_ids={"en": 57, "de": 58},
        special=frozenset({bos, PAD, eos, 57, 58}),
        limit=ROOM,
        bos=bos,
        eos=eos,
    )


def text_tower(kind):
    config, ids = CONFIGS[kind], jnp.zeros((1, 2), jnp.int32)
    if kind == "clip":  # CLIP looks for the largest id, its end token
        params = fill(ClipText(config, jnp.float32).init, ids, None)["params"]
        return TextTower(config, params, numbers(bos=58, eos=59), jnp.float32)
    params = fill(MClip(config, jnp.float32).init, ids, ids > 0)["params"]
    return TextTower(config, params, numbers(), jnp.float32)


def ids_of(tower, language="en"):
    return tower.tokenizer.encode(TEXTS[language], None)


def padded(tower, ids, length=ROOM):
    """Features of all sentences at once."""
    apply = jax.jit(tower.apply)
    return np.asarray(apply(tower.params, pad(ids, length, pad_id=PAD)))


class Sums(TextTower):
    """A tower that sums a sentence's words, each weighted by its position."""

    def apply(self, params, ids, *, dropout=None):
        weights = jnp.where(ids != PAD, params["place"][: ids.shape[1]], 0)
        return jnp.stack([jnp.sum(weights * ids, axis=1), jnp.sum(ids != PAD, axis=1)], axis=1)


@pytest.mark.parametrize("batch", [1, 4, 256])
def test_every_sentence_gets_its_own_feature(batch, monkeypatch):
    monkeypatch.setattr(encoders, "TEXT_BATCH", batch)
    place = np.arange(1, ROOM + 1, dtype=np.float32)
    tower = Sums(CONFIGS["mclip"], {"place": place}, numbers(), jnp.float32)
    ids = ids_of(tower)
    assert tuple(map(len, ids)) == LENGTHS
    order = encoders.by_length(ids)
    assert order.tolist() == [1, 4, 3, 0, 5, 2] and order[order].tolist() != [*range(6)]
    wanted = [[float((place[: len(x)] * x).sum()), len(x)] for x in ids]
    assert tower.encode(ids, mesh=one_device()).tolist() == wanted


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_ignore_padding(kind):
    tower = text_tower(kind)
    ids = [x for x in ids_of(tower) if len(x) <= 6]
    found, wanted = padded(tower, ids, 6), padded(tower, ids, 9)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    apart = np.abs(wanted[:, None] - wanted[None]).max(axis=-1)
    assert apart[~np.eye(len(ids), dtype=bool)].min() > 1e-2


def batches_of(ids, room, mesh=None):
    return list(encoders._text_batches(ids, PAD, room, mesh or one_device()))


def test_batches_are_padded_to_bucket_multiples_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(encoders, "TEXT_BATCH", 2)
    ids = [np.full(length, length, np.int32) for length in (2, 8, 8, 9, 17, 18, 25)]
    found = batches_of(ids, 20 + 10)
    assert [batch["ids"].shape for batch in found] == [(2, 8), (2, 16), (2, 24), (2, 30)]
    assert [batch["ids"].shape for batch in batches_of(ids[:1], 30)] == [(1, 8)]
    assert [batch["_mask"].tolist() for batch in found] == [[1, 1], [1, 1], [1, 1], [1, 0]]
    assert found[0]["ids"].tolist() == [[2, 2, *[PAD] * 6], [8] * 8]
    np.testing.assert_array_equal(found[3]["ids"][0], found[3]["ids"][1])


def test_hosts_read_their_rows_of_the_same_batches(monkeypatch):
    monkeypatch.setattr(encoders, "TEXT_BATCH", 4)
    ids = [np.full(3, 10 + number, np.int32) for number in range(6)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for host in range(2):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        parts.append(batches_of(ids, ROOM))
    for one, other, rows, mask in zip(
        *parts, ([10, 11, 12, 13], [14, 15, 15, 15]), ([1, 1, 1, 1], [1, 1, 0, 0]), strict=True
    ):
        assert [*one["ids"][:, 0], *other["ids"][:, 0]] == rows
        assert [*one["_mask"], *other["_mask"]] == mask


def test_batch_splits_over_all_devices():
    assert [encoders.whole_batch(size, split_mesh()) for size in (256, 20, 8, 3)] == [256, 24, 8, 8]
    shapes = text_tower("mclip").batch_shapes(split_mesh(), tokens=10)
    assert (shapes["ids"].shape, shapes["_mask"].shape) == ((256, 10), (256,))
    assert text_tower("clip").batch_shapes(one_device(), tokens=50)["ids"].shape == (256, ROOM)


@pytest.mark.parametrize("kind", CONFIGS)
def test_described_tower_has_the_shapes_of_a_loaded_one(kind):
    found, tower = TextTower.described(CONFIGS[kind], jnp.float32), text_tower(kind)
    assert tower.longest == found.longest == ROOM
    shapes = (jax.tree.map(lambda leaf: leaf.shape, one.params) for one in (found, tower))
    assert next(shapes) == next(shapes)


def test_text_tower_uses_dropout_only_with_a_key():
    tower = text_tower("mclip")
    ids, keys = jnp.asarray(ids_of(tower)[0][None]), [jax.random.key(seed) for seed in (0, 0, 1)]
    apply = jax.jit(lambda key: tower.apply(tower.params, ids, dropout=key))
    first, same, other = (np.asarray(apply(key)) for key in keys)
    np.testing.assert_array_equal(first, same)
    for one in (other, np.asarray(apply(None))):
        assert np.abs(first - one).max() > 1e-3


def text_corpus(texts=TEXTS):
    return Corpus("numbers of val", texts, None, tuple(map(str, range(len(LENGTHS)))))


def test_text_features_use_no_language_token(tmp_path):
    tower = text_tower("mclip")
    found = text_features(tower, text_corpus(), "en", folder=tmp_path, mesh=one_device())
    framed = [np.array([0, *map(int, text.split()), 2], np.int32) for text in TEXTS["en"]]
    np.testing.assert_allclose(found, padded(tower, framed), rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["numbers_of_val.en.npz"]


@pytest.fixture
def fingerprints(monkeypatch):
    """The fingerprints of the requested features; none are computed."""
    asked = []

    def cached(folder, name, fingerprint, compute):
        asked.append(fingerprint)
        return np.zeros((len(LENGTHS), 1), np.float32)

    monkeypatch.setattr(encoders, "cached", cached)
    return asked


def moved(tower):
    """The tower with one number changed."""
    params = jax.tree.map(lambda leaf: leaf, tower.params)
    first = jax.tree.leaves(params)[0]
    return dataclasses.replace(
        tower, params=jax.tree.map(lambda leaf: leaf + 1 if leaf is first else leaf, params)
    )


def test_text_features_are_cached_per_tower_and_text(fingerprints, tmp_path):
    tower, english = text_tower("mclip"), TEXTS["en"]
    towers = [
        tower,
        moved(tower),
        dataclasses.replace(tower, config=dataclasses.replace(tower.config, eps=1e-6)),
        dataclasses.replace(tower, dtype=jnp.dtype("bfloat16")),
    ]
    texts = [english[::-1], (*english[:-1], "28"), ("4 5 6", "7 8", *english[2:])]
    cases = [(one, english) for one in towers] + [(tower, one) for one in texts]
    for one, sentences in cases * 2:
        corpus = text_corpus({"en": sentences})
        text_features(one, corpus, "en", folder=tmp_path, mesh=one_device())
    assert len(set(fingerprints)) == len(cases)
    assert fingerprints[: len(cases)] == fingerprints[len(cases) :]
    with matmul_precision("highest"):
        text_features(tower, text_corpus(), "en", folder=tmp_path, mesh=one_device())
    assert fingerprints[-1] not in fingerprints[:-1]
    with matmul_precision("default"):
        text_features(tower, text_corpus(), "en", folder=tmp_path, mesh=one_device())
    assert fingerprints[-1] == fingerprints[0]


def test_image_features_are_cached_per_tower_and_set(tower, corpus, fingerprints, tmp_path):
    def having(names=NAMES, keys=NAMES):
        return dataclasses.replace(corpus, images=FolderImages(tmp_path, names), keys=keys)

    towers = [
        tower,
        moved(tower),
        dataclasses.replace(tower, config=dataclasses.replace(tower.config, eps=1e-6)),
        dataclasses.replace(tower, dtype=jnp.dtype("bfloat16")),
    ]
    other = ("d.png", *NAMES[1:])
    draw("a green cross").save(tmp_path / "d.png")
    # Another first, middle or last picture under existing names.
    changed = [
        having(tuple("d.png" if place == at else x for place, x in enumerate(NAMES)))
        for at in (0, len(NAMES) // 2, len(NAMES) - 1)
    ]
    corpora = [having(other, other), having(NAMES[::-1], NAMES[::-1]), *changed]
    cases = [(one, having()) for one in towers] + [(tower, one) for one in corpora]
    for one, examples in cases * 2:
        encode(one, examples, tmp_path)
    assert len(set(fingerprints)) == len(cases)
    assert fingerprints[: len(cases)] == fingerprints[len(cases) :]
