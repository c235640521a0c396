"""The towers that a run uses: published ones, and those that a run of stage "clip" trained."""

import dataclasses
import logging
import types

import jax
import numpy as np
import pytest
from etils import epath
from meshes import one_device
from same import assert_same
from tiny import write_averaged
from tiny_cliptrans import tiny_config

from cliptrans_jax.config import SourcesConfig
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.features import fingerprint
from cliptrans_jax.runs import contrastive, run_towers, translation
from cliptrans_jax.runs.finished import Finished, _with_own_towers
from cliptrans_jax.runs.run_data import RunData
from cliptrans_jax.runs.run_tokenizer import train_tokenizer
from cliptrans_jax.runs.run_towers import describe_text
from cliptrans_jax.towers.clip import ClipTextConfig
from cliptrans_jax.towers.labse import LabseConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.towers.siglip import SiglipTextConfig
from common_jax import checkpoint
from common_jax.config import unfreeze


def config_of(stage, root=None, **changes):
    return dataclasses.replace(tiny_config(stage, root), **changes)


@pytest.mark.parametrize(
    ("sources", "kind", "sizes"),
    [
        ({"clip": "run"}, "xlmr", None),  # the config's own kind
        ({"clip_text": "tower"}, "xlmr", MClipConfig()),
        ({"clip_text": "tower"}, "clip", ClipTextConfig()),
        ({"clip_text": "tower"}, "labse", LabseConfig()),
        ({"siglip": "both"}, "xlmr", SiglipTextConfig()),
        ({}, "trained", None),
    ],
)
def test_text_tower_description_follows_its_source(sources, kind, sizes):
    tokenizer = TokenizerConfig(kind, "" if kind == "trained" else "folder")
    config = config_of("translate", sources=SourcesConfig(**sources), clip_tokenizer=tokenizer)
    assert describe_text(config).config == (sizes or config.clip.text)


BOTH = {"clip_image": "/no", "clip_text": "/no"}


@pytest.mark.parametrize("given", [{"clip_image": "there"}, BOTH])
def test_pipeline_requires_every_tower_at_its_start(corpus, tmp_path, given):
    """Rather than when the stage that needs it starts, after hours of captioning."""
    config = config_of("translate", corpus, sources=SourcesConfig(**given))
    with pytest.raises((ValueError, OSError), match=r"sources\.clip_text|clip_tokenizer"):
        translation.check(config, epath.Path(tmp_path), one_device(), key="config")
    later = dataclasses.replace(config, sources=SourcesConfig(clip=str(tmp_path / "clip")))
    translation.check(later, epath.Path(tmp_path), one_device(), key="config")


def test_published_towers_are_read_with_the_config_settings(monkeypatch, tmp_path):
    unpublished = dataclasses.replace(run_towers.TEXT_TOWERS[0], kind="")
    monkeypatch.setattr(run_towers, "TEXT_TOWERS", (*run_towers.TEXT_TOWERS, unpublished))
    asked = {}

    def load(folder, **settings):
        asked[folder] = settings
        return types.SimpleNamespace(config=folder, params={})

    monkeypatch.setattr(run_towers.pretrained, "load", load)
    monkeypatch.setattr(
        run_towers, "published_text", lambda found, tokenizer, *, dtype: (found.config, tokenizer)
    )
    sources = SourcesConfig(
        clip_text="text", clip_image="image", fetch=True, weights="ema", clip_activation="gelu",
        clip_text_base="base",
    )  # fmt: skip
    tokenizer = TokenizerConfig("clip", "folder")
    config = config_of("translate", sources=sources, clip_tokenizer=tokenizer)
    made = RunData(config, epath.Path(tmp_path), one_device())
    assert made.text_tower == ("text", tokenizer) and made.image_tower.config == "image"
    both = {"fetch": True, "weights": "ema", "activation": "gelu"}
    assert asked == {
        "text": both | {"kind": ("mclip", "siglip_text", "clip_text"), "base": "base"},
        "image": both | {"kind": ("clip_res", "clip_vision", "siglip_vision"), "base": ""},
    }
    # The key is for a published translator's file if there is one.
    sources = dataclasses.replace(sources, mbart="translator")
    made = RunData(dataclasses.replace(config, sources=sources), epath.Path(tmp_path), one_device())
    assert made.image_tower.config == "image" and asked["image"]["weights"] == ""


def test_towers_from_a_run_have_the_sizes_of_that_run(corpus, monkeypatch, tmp_path):
    """Regardless of the sizes of stage "clip" in this config."""
    config = config_of("translate", corpus, sources=SourcesConfig(clip="trained"))
    tokenizer, _ = train_tokenizer(config, epath.Path(tmp_path))
    sizes = {"heads": 4, "eps": 1e-3}
    positions = tokenizer.limit - 5
    trained = config_of(
        "clip",
        clip=dataclasses.replace(
            config.clip,
            text=dataclasses.replace(config.clip.text, positions=positions, **sizes),
            image=dataclasses.replace(config.clip.image, **sizes),
        ),
    )
    monkeypatch.setattr(
        run_towers.checkpoint, "load_config", lambda source: unfreeze(trained).to_dict()
    )
    monkeypatch.setattr(
        run_towers.checkpoint,
        "load",
        lambda step, subtree, average: {step.name: np.array(len(subtree)), "average": average},
    )
    monkeypatch.setattr(run_towers.checkpoint, "common_step", epath.Path)
    made = RunData(config, epath.Path(tmp_path), one_device(), known=tokenizer)
    text, image = made.text_tower, made.image_tower
    # Sentences are cut to what the tower reads, which may be less than what the translator reads.
    assert text.tokenizer == dataclasses.replace(tokenizer, limit=text.longest)
    assert text.longest < tokenizer.limit
    assert (text.config, image.config) == (trained.clip.text, trained.clip.image)
    assert text.params == {"trained": len("clip/text"), "average": True}
    assert image.params == {"trained": len("clip/image"), "average": True}
    asked = dataclasses.replace(config, stage="clip")  # of the run itself: its result
    made = RunData(asked, epath.Path(tmp_path), one_device(), known=tokenizer)
    assert made.text_tower.params["average"] and made.image_tower.params["average"]
    # A text tower that keeps training starts from the parameters themselves.
    asked = dataclasses.replace(config, unfreeze_clip=True)
    made = RunData(asked, epath.Path(tmp_path), one_device(), known=tokenizer)
    assert not made.text_tower.params["average"] and made.image_tower.params["average"]


def test_features_are_of_the_average_that_the_towers_run_evaluated(corpus, tmp_path, caplog):
    """The same for a translator that uses the run as for the run itself."""
    caplog.set_level(logging.INFO)
    config = config_of("clip", corpus)
    params = contrastive.init(config, jax.random.key(0))
    average = write_averaged(tmp_path / "run", params, config, more=1)
    folder = epath.Path(tmp_path)
    tokenizer, _ = train_tokenizer(config, folder)
    used = config_of("translate", corpus, sources=SourcesConfig(clip=str(tmp_path / "run")))
    own = _with_own_towers(Finished(checkpoint.find_step(tmp_path / "run"), config))
    towers = [RunData(one, folder, one_device(), known=tokenizer) for one in (used, own)]
    for name in ("text", "image"):
        mine, theirs = (getattr(one, f"{name}_tower").params for one in towers)
        assert_same(mine, average["clip"][name])
        assert fingerprint(mine) == fingerprint(theirs) != fingerprint(params["clip"][name])
        assert f"run/checkpoints/1: the average of its {name} tower is loaded" in caplog.text
