"""Stage "clip" with a published text tower that stays frozen: what it trains, reads and saves, and
what later runs take from it."""

import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath
from jax import numpy as jnp
from meshes import one_device
from tiny import fill
from tiny_cliptrans import FEATURES, number_tokenizer, read_split, tiny_config, tiny_pipeline

from cliptrans_jax.config import SourcesConfig
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.encoders import TextTower
from cliptrans_jax.export.folder import _has_published_text
from cliptrans_jax.runs import contrastive, run_towers
from cliptrans_jax.runs.finished import Finished, _with_own_towers
from cliptrans_jax.runs.pipeline import plan
from cliptrans_jax.runs.run_data import RunData
from cliptrans_jax.runs.run_tokenizer import TOKENIZER
from cliptrans_jax.runs.run_towers import load_trained
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.towers.table import tower_of
from common_jax import checkpoint
from common_jax.config import unfreeze

SIZES = MClipConfig(
    vocab=60, width=16, layers=1, heads=2, hidden=32, positions=32, features=FEATURES
)


def lock(config, *, text="tower"):
    """The config with this text tower, frozen."""
    return dataclasses.replace(
        config,
        clip=dataclasses.replace(config.clip, lock_text=True),
        sources=dataclasses.replace(config.sources, clip_text=text),
        clip_tokenizer=TokenizerConfig("xlmr", "folder"),
    )


@pytest.fixture
def tower(monkeypatch):
    """The text tower of every run, whose tokens are a sentence's letters."""
    letters = dataclasses.replace(
        number_tokenizer(limit=30),
        cut=lambda texts: [[4 + ord(letter) % 50 for letter in text] for text in texts],
    )
    params = jax.tree.map(np.asarray, fill(functools.partial(tower_of(SIZES).init, SIZES, "f4")))
    made = TextTower(SIZES, params, letters, np.dtype("f4"))
    monkeypatch.setattr(RunData, "text_tower", made)
    return made


def test_only_the_image_tower_trains_on_precomputed_text_features(corpus, tower, tmp_path):
    config, workdir = lock(tiny_config("clip", corpus)), epath.Path(tmp_path / "run")
    result = contrastive.run(config, workdir, one_device())
    assert result["steps"] == 6 and 0 <= result["val/accuracy"] <= 1
    assert not (workdir / TOKENIZER).exists()
    files = sorted(path.name for path in (workdir / "features").iterdir())
    names = (f"{split}.{code}" for split in ("train", "val") for code in ("de", "en"))
    assert files == [f"multi30k_{name}.npz" for name in names]
    saved = checkpoint.load(workdir, subtree="clip")
    start = contrastive.init(config, jax.random.key(0))["clip"]
    assert saved.keys() == start.keys() == {"image", "log_scale"}
    sizes, image = load_trained(
        dataclasses.replace(config, sources=SourcesConfig(clip=str(workdir), clip_text="tower")),
        "image",
    )
    assert sizes == config.clip.image
    jax.tree.map(np.testing.assert_array_equal, image, saved["image"])


def test_image_tower_initialisation_ignores_the_text_lock():
    config, key = tiny_config("clip", None), jax.random.key(3)
    both, one = (contrastive.init(x, key)["clip"] for x in (config, lock(config)))
    assert both.keys() - one.keys() == {"text"}
    jax.tree.map(np.testing.assert_array_equal, both["image"], one["image"])
    rules = contrastive.partition_rules(lock(config))
    assert rules and not any("text" in regex for regex, _ in rules)


def test_text_features_match_the_language_of_each_name(corpus, tower, tmp_path):
    config = lock(dataclasses.replace(tiny_config("clip", corpus), languages=("de", "en")))
    pairs = contrastive._Pairs.of(config, "val", tower.tokenizer)
    encoded = pairs.encoded(tower=tower, folder=epath.Path(tmp_path), mesh=one_device())
    english, german, _ = read_split(corpus, "val")
    for texts, place in ((german, 0), (english, 1)):
        expected = tower.encode(tower.tokenizer.encode(texts, None), mesh=one_device())
        found = [encoded[index]["names"][place] for index in range(len(encoded))]
        np.testing.assert_array_equal(found, expected)
    prepared = contrastive._prepare(config, 8, encoded[2])
    np.testing.assert_array_equal(prepared["features"], encoded[2]["names"][0])
    drawn = contrastive._augment(config, 8, encoded[2], np.random.default_rng(0))
    assert prepared.keys() == drawn.keys() == {"image", "features"}
    assert any((drawn["features"] == name).all() for name in encoded[2]["names"])
    shapes = contrastive.describe(config, steps=1, length=8).batch
    assert shapes["features"].shape == (8, FEATURES) and shapes.keys() == prepared.keys()
    # They enter the loss unchanged.
    params = {"clip": {"image": fill(lambda key: contrastive.init(config, key)["clip"]["image"])}}
    batch = {name: jnp.asarray(x)[None] for name, x in prepared.items()}
    texts, images = contrastive._embed(config, params, batch, jax.random.key(0))
    np.testing.assert_array_equal(texts, batch["features"])
    assert images.shape == texts.shape


def test_both_towers_must_have_the_same_width(corpus, tower, tmp_path):
    config = lock(tiny_config("clip", corpus))
    image = dataclasses.replace(config.clip.image, features=FEATURES + 1)
    config = dataclasses.replace(config, clip=dataclasses.replace(config.clip, image=image))
    message = r"config\.clip\.image\.features=9 must be 8, .* config\.sources\.clip_text='tower'"
    with pytest.raises(ValueError, match=message):
        contrastive.check(config, epath.Path(tmp_path), one_device(), key="config")


def test_pipeline_trains_only_the_image_tower(tmp_path):
    runs = dict(plan(lock(tiny_pipeline(None)), tmp_path))
    assert [*runs] == ["clip", "caption", "translate"]
    assert {one.sources.clip_text for one in runs.values()} == {"tower"}
    clips = [one.sources.clip for one in runs.values()]
    assert clips == ["", str(tmp_path / "clip"), str(tmp_path / "clip")]
    # With a published image tower too, there is nothing to train.
    config = lock(tiny_pipeline(None))
    sources = dataclasses.replace(config.sources, clip_image="image")
    assert "clip" not in dict(plan(dataclasses.replace(config, sources=sources), tmp_path))


def test_text_tower_is_given_if_and_only_if_it_was_frozen(monkeypatch):
    stored, config = tiny_config("clip", None), tiny_config("translate", None)
    monkeypatch.setattr(checkpoint, "load_config", lambda source: unfreeze(stored).to_dict())
    given = dataclasses.replace(config, sources=SourcesConfig(clip="run", clip_text="other"))
    for name in ("text", "image"):
        with pytest.raises(ValueError, match=r"'run' is a run that trained both .*'other'"):
            load_trained(given, name)
    stored = lock(stored)
    bare = dataclasses.replace(config, sources=SourcesConfig(clip="run"))
    message = r"give config\.sources\.clip_text='tower', and .* kind='xlmr' and path='folder'"
    for name in ("text", "image"):
        with pytest.raises(ValueError, match=message):
            load_trained(bare, name)


def test_different_text_tower_from_training_gives_a_warning(monkeypatch, tmp_path, caplog):
    stored = unfreeze(lock(tiny_config("clip", None), text=str(tmp_path / "tower"))).to_dict()
    monkeypatch.setattr(checkpoint, "load_config", lambda source: stored)
    load = mock.Mock(side_effect=FileNotFoundError("nothing is loaded here"))
    monkeypatch.setattr(run_towers, "_load_published", load)
    for text, warnings in (("tower", 0), ("another", 1)):
        caplog.clear()
        config = lock(tiny_config("translate", None), text=str(tmp_path / text))
        sources = dataclasses.replace(config.sources, clip="run")
        config = dataclasses.replace(config, sources=sources)
        with pytest.raises(FileNotFoundError, match="nothing is loaded"):
            RunData(config, epath.Path(tmp_path), one_device()).text_tower  # noqa: B018
        assert len(caplog.messages) == warnings
    assert "is not the text tower that the run in config.sources.clip='run'" in caplog.text


def test_run_is_used_with_the_text_tower_of_its_training(tmp_path):
    step = epath.Path(tmp_path / "run" / "checkpoints" / "6")
    plain = tiny_config("clip", None)
    for config, text in ((plain, ""), (lock(plain), "tower")):
        run = Finished(step, config)
        sources = _with_own_towers(run).sources
        assert (sources.clip, sources.clip_text) == (str(step), text)
        # An export has only the towers that were trained here.
        assert _has_published_text(run) is bool(text)
    later = dataclasses.replace(
        tiny_config("translate", None), sources=SourcesConfig(clip="run", clip_text="tower")
    )
    assert _has_published_text(Finished(step, later))
