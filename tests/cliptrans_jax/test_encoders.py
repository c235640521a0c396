"""The image tower: one feature an example, computed once a picture."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from meshes import one_device
from tiny_cliptrans import draw, tiny_config

from cliptrans_jax.data.corpus import Corpus, FolderImages
from cliptrans_jax.data.pictures import prepare_picture
from cliptrans_jax.encoders import ImageTower, image_features
from cliptrans_jax.models.clip import ClipVision

NAMES = ("b.png", "a.png", "b.png", "c.png", "a.png", "b.png")
DRAWN = {"a.png": "a red square", "b.png": "a blue cross", "c.png": "a green bar above"}


@dataclasses.dataclass(frozen=True)
class Watched(FolderImages):
    """Notes in `reads` which pictures are asked for."""

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


def test_a_picture_of_several_examples_is_encoded_and_kept_once(tower, corpus, tmp_path):
    found = encode(tower, corpus, tmp_path / "features")
    pictures = [prepare_picture(np.asarray(draw(DRAWN[name])), 16) for name in NAMES]
    wanted = tower.apply(tower.params, jnp.stack(pictures))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    with np.load(tmp_path / "features" / "shapes.pictures.npz") as kept:
        assert kept["features"].shape == (len(DRAWN), found.shape[1])
    assert corpus.images.reads.count("a.png") == 1
    again = encode(tower, corpus, tmp_path / "features")
    np.testing.assert_array_equal(found, again)


def test_an_order_of_its_own_is_another_set(tower, corpus, tmp_path):
    """The same pictures in another order, in the same folder of features."""
    found = encode(tower, corpus, tmp_path / "features")
    names = NAMES[::-1]
    turned = dataclasses.replace(corpus, images=FolderImages(tmp_path, names), keys=names)
    np.testing.assert_allclose(encode(tower, turned, tmp_path / "features"), found[::-1], atol=1e-6)


def test_processes_that_read_change_nothing(tower, corpus, tmp_path):
    here = encode(tower, corpus, tmp_path / "here")
    corpus.images.reads.clear()
    there = encode(tower, corpus, tmp_path / "there", workers=2)
    np.testing.assert_array_equal(here, there)
    # The others are read here, too: for the fingerprint, and to pad a batch.
    assert "a.png" not in corpus.images.reads
