"""A loaded model translates sentences and pictures with their own features."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
from meshes import one_device
from tiny_cliptrans import ENGLISH, GERMAN, number_tokenizer, tiny_config

from cliptrans_jax.data.pictures import prepare_picture
from cliptrans_jax.evaluators.show import Hypothesis
from cliptrans_jax.loading import LoadedModel

PAD = 1
NUMBERS = number_tokenizer(limit=9)
# The order by length, longest first, is 2 5 0 3 1 4: not its own inverse.
SENTENCES = ("4 5 6 7", "8", "9 10 11 12 13 14 15 16 17", "18 19", "20", "21 22 23 24 25 26 27")
PICTURES = tuple(np.full((16, 16, 3), 40 * number, np.uint8) for number in range(6))


@dataclasses.dataclass(eq=False)
class TextTower:
    """Features are the sum of a sentence's ids, special tokens included."""

    params: dict = dataclasses.field(default_factory=lambda: {"factor": np.float32(1)})

    tokenizer, longest = NUMBERS, 11

    def apply(self, params, ids):
        return params["factor"] * jnp.sum(ids, axis=1, where=ids != PAD, keepdims=True)


class ImageTower:
    """Features are the mean of a prepared picture."""

    config, params = types.SimpleNamespace(image=8), {"factor": np.float32(2)}

    def prepare(self, image):
        return prepare_picture(image, self.config.image)

    def apply(self, params, images):
        return params["factor"] * jnp.mean(images, axis=(1, 2))[:, :1]


def loaded(**changes):
    """A model whose search returns its input, and the batches that it gets."""
    config = tiny_config("translate", None)
    decode = dataclasses.replace(config.decode, batch=4, bucket=6)
    config = dataclasses.replace(config, decode=decode, **changes)
    fed = []

    def search(params, batches):
        found = {}
        for batch in batches:
            fed.append(batch)
            for row in np.flatnonzero(batch["_mask"]):
                words = batch["source"][row]
                text = " ".join(map(str, words[words != PAD]))
                inputs = batch.get("features", batch.get("clip_tokens", np.zeros((4, 1))))
                found[int(batch["_index"][row])] = [Hypothesis(text, float(inputs[row].sum()))]
        return found

    data = types.SimpleNamespace(text_tower=TextTower(), image_tower=ImageTower())
    return LoadedModel(config, {"mbart": 0}, NUMBERS, data, search, one_device()), fed


def framed(text):
    """The text as the encoder reads it, cut to the tokenizer's limit."""
    return " ".join([str(ENGLISH), *text.split()[:7], "2"])


def test_each_sentence_is_translated_with_its_own_feature():
    model, fed = loaded()
    found = model.translate(SENTENCES)
    assert [outputs[0].text for outputs in found] == [framed(text) for text in SENTENCES]
    sums = [float(sum([*map(int, text.split()[:7]), 2])) for text in SENTENCES]
    assert [outputs[0].score for outputs in found] == sums
    assert [batch["_index"].tolist() for batch in fed] == [[2, 5, 0, 3], [1, 4, 4, 4]]
    assert [batch["source"].shape for batch in fed] == [(4, 12), (4, 6)]
    assert {int(code) for batch in fed for code in batch["labels"][:, 0]} == {GERMAN}


def test_each_image_belongs_to_its_sentence():
    model, _ = loaded()
    found = model.translate(SENTENCES, pictures=PICTURES)
    assert [outputs[0].text for outputs in found] == [framed(text) for text in SENTENCES]
    wanted = [2 * prepare_picture(picture, 8)[..., 0].mean() for picture in PICTURES]
    assert [outputs[0].score for outputs in found] == pytest.approx(wanted, rel=1e-5)
    empty = model.translate([""] * 6, pictures=PICTURES)
    assert [outputs[0].score for outputs in empty] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("stage", ["caption", "text_recon"])
def test_captioning_run_writes_captions_and_reads_no_words(stage):
    model, fed = loaded(stage=stage, caption_language="en")
    found = model.translate(SENTENCES[:2], pictures=PICTURES[:2])
    assert model.pair == ("en", "en")
    assert [outputs[0].text for outputs in found] == [f"{ENGLISH} 2"] * 2  # only the special tokens
    assert {int(code) for batch in fed for code in batch["labels"][:, 0]} == {ENGLISH}
    wanted = [2 * prepare_picture(picture, 8)[..., 0].mean() for picture in PICTURES[:2]]
    assert [outputs[0].score for outputs in found] == pytest.approx(wanted, rel=1e-5)


def test_sentence_is_truncated_for_a_shorter_tower(monkeypatch):
    monkeypatch.setattr(TextTower, "longest", 4)
    found = loaded()[0].translate(["4 5 6 7 8"])
    assert found[0][0].text == framed("4 5 6 7 8")
    assert found[0][0].score == 4.0 + 5.0 + 2.0  # "<s>" is 0, and "</s>" 2


def test_trained_tower_receives_tokens():
    model, fed = loaded(unfreeze_clip=True)
    model.translate(SENTENCES[:2])
    tokens = fed[0]["clip_tokens"]
    assert "features" not in fed[0]
    assert tokens.tolist() == [[0, 4, 5, 6, 7, 2], *[[0, 8, 2, PAD, PAD, PAD]] * 3]


def test_model_without_prefix_receives_neither_features_nor_tokens():
    config = tiny_config("translate", None).model
    mapper = dataclasses.replace(config.mapper, prefix=0)
    model, fed = loaded(model=dataclasses.replace(config, mapper=mapper))
    model.translate(SENTENCES)
    assert all(not {"features", "clip_tokens"} & set(batch) for batch in fed)


def test_whitespace_is_normalised_as_in_files():
    model, _ = loaded()
    texts = [outputs[0].text for outputs in model.translate([" 4 5\n", "4 \n 5", "4\t5"])]
    assert texts == [f"{ENGLISH} 4 5 2"] * 3


def test_loaded_model_has_a_one_line_repr():
    model, _ = loaded()
    assert repr(model) == "LoadedModel(stage='translate', pair=('en', 'de'), 1 parameters)"


@pytest.mark.parametrize("unfreeze_clip", [False, True])
def test_features_of_sentences_and_pictures(unfreeze_clip):
    model, _ = loaded(unfreeze_clip=unfreeze_clip, stage="translate")
    model = dataclasses.replace(model, params={"clip": {"factor": np.float32(3)}})
    features = model.sentence_features(SENTENCES)
    factor = 3 if unfreeze_clip else 1
    sums = [factor * (sum([*map(int, text.split()[:7])]) + 2) for text in SENTENCES]
    np.testing.assert_array_equal(features, np.array(sums, np.float32)[:, None])
    wanted = [2 * prepare_picture(picture, 8)[..., 0].mean() for picture in PICTURES]
    np.testing.assert_allclose(model.picture_features(PICTURES)[:, 0], wanted, rtol=1e-5)
    assert model.params["clip"] == {"factor": np.float32(3)}
    for call in (model.sentence_features, model.picture_features):
        with pytest.raises(ValueError, match="is empty; give at least one"):
            call([])
