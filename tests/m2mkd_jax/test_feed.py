"""A run's feed: which images, how many at a time, starting at which step, and what is added on the
device."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from draws import keys_drawn_from
from etils import epath
from jax import numpy as jnp
from PIL import Image
from tiny import tiny_config

from common_jax.inputs import BadExample
from m2mkd_jax.data import feed as feeds
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.feed import batch_shapes, make_feed, prepare_evaluation, prepare_training
from m2mkd_jax.data.in_memory import DecodedSource
from m2mkd_jax.data.ood import OodConfig
from m2mkd_jax.data.source import ArraySource
from m2mkd_jax.data.sources import DataConfig
from m2mkd_jax.data.subsets import Subset

NAMES = tuple("0123456789")


def numbers(size, *, first=0, bad=()):
    """Image i is first + i everywhere; those in `bad` cannot be read."""
    values = np.arange(first, first + size, dtype=np.uint8)[:, None, None, None]
    images, labels = np.tile(values, (1, 8, 8, 1)), np.arange(size, dtype=np.int32) % 10
    if not bad:
        return ArraySource({"image": images, "label": labels}, NAMES)
    wrong = {index: BadExample(f"number {first + index}", "it is bad") for index in bad}
    return DecodedSource(images, labels, label_names=NAMES, bad=wrong)


def feed_of(workdir, *, data=None, augment=None, **settings):
    sizes = {"batch": 8, "micro_batch": 4, "seed": 0}
    sources = {"train": numbers(30), "test": numbers(10, first=100)}
    data, augment = data or DataConfig(), augment or AugmentConfig()
    return make_feed(data, augment, workdir=epath.Path(workdir), **sizes | sources | settings)


def values(batches, count):
    return [next(batches)["image"][:, 0, 0, 0].tolist() for _ in range(count)]


def test_training_batches_by_hand(tmp_path):
    """The first order for seed 0 is frozen, see tests/common_jax/test_inputs.py."""
    feed = feed_of(tmp_path, train=numbers(8), batch=4)
    assert values(feed.batches(0), 2) == [[6, 3, 5, 0], [7, 2, 1, 4]]
    assert values(feed.batches(1), 1) == [[7, 2, 1, 4]]
    assert feed.steps_per_epoch == 2 and feed.label_names == NAMES
    feed = feed_of(tmp_path, train=numbers(8), batch=4, augment=AugmentConfig(repeats=3))
    assert values(feed.batches(0), 2) == [[6, 6, 6, 3], [3, 3, 5, 5]]


def test_training_and_test_sets_are_compared_across_hosts(tmp_path, monkeypatch):
    compared = {}
    monkeypatch.setattr(
        feeds.hosts, "require_same", lambda what, *parts: compared.update({what: parts})
    )
    feed_of(tmp_path)
    assert compared == {
        f"the {name} set of config.data": (
            (np.arange(size, dtype=np.int32) % 10).tobytes(),
            "\n".join(NAMES),
        )
        for name, size in (("training", 30), ("test", 10))
    }


def test_ood_set_is_compared_across_hosts(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(feeds.hosts, "require_same", lambda what, *parts: compared.append(what))
    config = tiny_config("end_to_end")
    tiny.feed_of(dataclasses.replace(config, ood=OodConfig(source="digits_r")), tmp_path)
    assert compared[2:] == ["the OOD set of config.ood"]


def test_batches_depend_on_seed_and_step(tmp_path):
    feed = feed_of(tmp_path)
    assert feed.steps_per_epoch == 3
    assert values(feed.batches(4), 2) == values(feed.batches(0), 6)[4:]
    assert values(feed.batches(0), 1) != values(feed_of(tmp_path, seed=1).batches(0), 1)


def test_evaluation_splits_test_set_into_micro_batches(tmp_path):
    feed = feed_of(tmp_path, augment=AugmentConfig(repeats=3, randaugment=True))
    for _ in range(2):  # each call makes a new pass
        batches = list(feed.evaluation())
        assert [batch["image"].shape for batch in batches] == [(4, 8, 8, 1)] * 3
        shown = np.concatenate([batch["image"][:, 3, 3, 0] for batch in batches])
        assert shown.tolist() == [*range(100, 110), 0, 0]
        assert np.concatenate([batch["_mask"] for batch in batches]).tolist() == [1] * 10 + [0] * 2


def test_host_augmentation_depends_on_seed(tmp_path):
    config = AugmentConfig(randaugment=True, padding=3)
    images = next(feed_of(tmp_path, augment=config).batches(0))["image"]
    assert any(image.min() != image.max() for image in images)
    again = next(feed_of(tmp_path, augment=config).batches(0))["image"]
    np.testing.assert_array_equal(images, again)
    other = next(feed_of(tmp_path, augment=config, seed=1).batches(0))["image"]
    assert (images != other).any()


@pytest.mark.parametrize("kind", ["train", "test"])
def test_bad_images_are_reported_up_to_bad_share(tmp_path, kind):
    def read(share):
        sources = {kind: numbers(10, bad=(3,))}
        feed = feed_of(tmp_path, data=DataConfig(bad_share=share), batch=5, **sources)
        return list(feed.evaluation()) if kind == "test" else values(feed.batches(0), 2)

    with pytest.raises(ValueError, match="1 bad examples of 10"):
        read(0.05)
    (tmp_path / "bad_examples.jsonl").unlink(missing_ok=True)
    read(0.1)
    assert "number 3" in (tmp_path / "bad_examples.jsonl").read_text()


@pytest.mark.parametrize("chosen", [False, True])
def test_test_set_with_too_many_bad_images_is_refused_before_training(tmp_path, chosen):
    """Of a set in memory, whose bad images are known."""
    test = numbers(12, bad=(3, 7))
    if chosen:
        kept = np.array([7, 1, 2, 3, 0, 4, 5, 6, 8, 9])
        test = Subset(test, kept, test.labels[kept], NAMES)
    share = 2 / len(test)
    feed_of(tmp_path, data=DataConfig(bad_share=share), test=test)
    with pytest.raises(
        ValueError, match=r"bad examples of 1\d, .*number (3|7).*or raise config\.da"
    ):
        feed_of(tmp_path, data=DataConfig(bad_share=share - 0.01), test=test)
    none_left = Subset(test, np.array([1]), test.labels[[1]], NAMES)
    feed_of(tmp_path, data=DataConfig(bad_share=0.0), test=none_left)
    assert not list(tmp_path.iterdir())


def test_batches_use_configured_workers_and_bad_share(tmp_path, monkeypatch):
    asked = []

    def note(source, **settings):
        asked.append(settings)

    monkeypatch.setattr(feeds.inputs, "train_batches", note)
    monkeypatch.setattr(feeds.inputs, "eval_batches", note)
    feed = feed_of(tmp_path, data=DataConfig(workers=3, bad_share=0.2), ood=OodConfig("digits_r"))
    feed.batches(7), feed.evaluation(), feed.ood()
    for settings in asked:
        assert settings["workers"] == 3 and settings["bad_share"] == 0.2
        assert settings["shard"] == (0, 1)
    assert [settings["batch"] for settings in asked] == [8, 4, 4]


def test_an_ood_set_is_evaluated_like_the_test_set(tmp_path):
    feed = feed_of(tmp_path, micro_batch=400, ood=OodConfig("digits_r"))
    batches = list(feed.ood())
    assert [batch["image"].shape[0] for batch in batches] == [400] * 4
    assert sum(batch["_mask"].sum() for batch in batches) == 286 * 5
    assert feed.ood_classes == (0, 1, 2, 3, 4, 5, 7, 8)
    assert feed_of(tmp_path).ood is None and feed_of(tmp_path).ood_classes == ()


def test_ood_images_of_wrong_size_are_refused(tmp_path):
    """Digits need no check of their size, but files that are also tested on do."""
    folder = tmp_path / "set/test/3"
    folder.mkdir(parents=True)
    Image.new("L", (9, 9)).save(folder / "0.png")
    with pytest.raises(ValueError, match=r"/3/0\.png: 9 x 9 pixels do not fit .*image_size=8"):
        feed_of(tmp_path, ood=OodConfig("folder", str(tmp_path / "set")))


COLOURED = DataConfig(
    "folder", image_size=4, channels=3, labels=5, mean=(0.5, 0.1, 0.25), std=(0.5, 0.2, 0.125)
)
BATCH = {
    "image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3)), jnp.uint8),
    "label": jnp.asarray([4, 0, 1, 2, 3, 4]),
}


def streams(augment=0, mix=0):
    return {"augment": jax.random.key(augment), "mix": jax.random.key(100 + mix)}


def preparing(config):
    """(seed of each stream) -> images and targets."""
    run = jax.jit(lambda rngs: prepare_training(BATCH, rngs, COLOURED, config))
    return lambda **seeds: map(np.asarray, run(streams(**seeds)))


def test_images_are_normalised_and_labels_smoothed_by_hand():
    images, targets = preparing(AugmentConfig(smoothing=0.1))()
    for channel, (mean, std) in enumerate(zip(COLOURED.mean, COLOURED.std, strict=True)):
        want = (np.asarray(BATCH["image"])[..., channel] / 255 - mean) / std
        np.testing.assert_allclose(images[..., channel], want, rtol=1e-5, atol=1e-6)
        found = prepare_evaluation(BATCH, COLOURED)[..., channel]
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(targets[0], [0.02, 0.02, 0.02, 0.02, 0.92], rtol=1e-6)
    assert targets.shape == (6, 5)


def test_augmentation_and_mixing_use_separate_streams():
    prepared = preparing(AugmentConfig(padding=1))
    (images, _), (moved, _), (same, _) = prepared(), prepared(augment=1), prepared(mix=1)
    assert (moved != images).any()
    np.testing.assert_array_equal(same, images)
    prepared = preparing(AugmentConfig(padding=1, mixup=1.0))
    first, moved, mixed = (tuple(prepared(**seed)) for seed in ({}, {"augment": 1}, {"mix": 1}))
    assert (moved[0] != first[0]).any() and (mixed[0] != first[0]).any()
    assert (mixed[1] != first[1]).any()
    np.testing.assert_array_equal(moved[1], first[1])


def test_no_two_draws_of_a_batch_share_a_key(monkeypatch):
    config = AugmentConfig(padding=1, flip=True, erasing=0.5, mixup=0.5, cutmix=0.5, shift=1.0)

    def run(key):
        augment_key, mix_key = jax.random.split(key)
        return prepare_training(BATCH, {"augment": augment_key, "mix": mix_key}, COLOURED, config)

    keys = keys_drawn_from(monkeypatch, run)
    assert len(keys) == 14 == len(set(keys))


def test_batch_shapes_match_batches(tmp_path):
    batch = next(feed_of(tmp_path).batches(0))
    shapes = batch_shapes(DataConfig(), 8)
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
        name: (x.shape, x.dtype) for name, x in batch.items()
    }
    assert batch_shapes(COLOURED, 2)["image"].shape == (2, 4, 4, 3)
