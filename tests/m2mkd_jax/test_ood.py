"""An OOD set with only some of the classes: which logits count, which names match, and the
renditions of digits."""

import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from PIL import Image
from tiny import feed_of, tiny_config

from common_jax.mesh import MeshConfig, make_mesh
from common_jax.optim import OptimConfig
from m2mkd_jax.config import FewShotConfig
from m2mkd_jax.data import digits
from m2mkd_jax.data.ood import OodConfig, load_ood
from m2mkd_jax.data.sources import DataConfig, load_source
from m2mkd_jax.data.subsets import match_classes
from m2mkd_jax.evaluators.classification import classification_sums, restrict_logits
from m2mkd_jax.main import results_table
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.few_shot import episode_feed, load_splits
from m2mkd_jax.phases.objective import Outputs
from m2mkd_jax.phases.phase import Training, config_feed
from m2mkd_jax.phases.training import train_phase

DIGITS = tuple("0123456789")
DIGITS_R = OodConfig(source="digits_r")


def naive(logits, labels, classes):
    """Accuracy, top-5 accuracy and cross entropy among `classes`, one example at a time."""
    best, best_five, loss = [], [], []
    for row, label in zip(logits, labels, strict=True):
        among = [float(row[c]) for c in classes]
        order = sorted(range(len(among)), key=lambda i: -among[i])
        best.append(order[0] == label)
        best_five.append(label in order[:5])
        loss.append(np.log(sum(np.exp(value) for value in among)) - among[label])
    return np.mean(best), np.mean(best_five), np.mean(loss)


@pytest.mark.parametrize("classes", [(0, 3, 4, 5, 8, 9, 11), (11, 2, 7)])
def test_metrics_are_restricted_to_the_classes_of_the_set(classes):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 12)).astype(np.float32)
    labels = rng.integers(0, len(classes), 40).astype(np.int32)
    chosen = restrict_logits(jnp.asarray(logits), classes)
    sums = classification_sums(chosen, jnp.asarray(labels), jnp.ones(40))
    found = [float(sums[name]) / 40 for name in ("accuracy", "accuracy_top5", "loss")]
    np.testing.assert_allclose(found, naive(logits, labels, classes), rtol=1e-5)


def test_classes_are_matched_by_name_in_any_order():
    base = ("n01", "n02", "n03", "n05")
    match = functools.partial(match_classes, at="config.ood", way_out="Rename the folders")
    assert match(("n02", "n05"), base) == (1, 3)
    assert match(("n05", "n01"), base) == (3, 0)
    with pytest.raises(ValueError, match=r"config\.ood .* lacks 1 of them: n04; .*n05"):
        match(("n01", "n04"), base)
    with pytest.raises(ValueError, match=r"lacks 2 of them: 0, 1; .*class numbers without names"):
        match(("0", "1"), base)


def test_digit_renditions_are_altered_test_digits():
    source = load_ood(DataConfig(), DIGITS_R, label_names=DIGITS)
    images, labels = source.source.arrays["image"], source.source.labels
    assert source.source.label_names == tuple("01234578")
    assert source.classes == (0, 1, 2, 3, 4, 5, 7, 8)
    originals, classes = digits.load_split("test")
    kept = ~np.isin(classes, (6, 9))
    count, kinds = int(kept.sum()), len(digits.RENDITIONS)
    assert images.shape == (count * kinds, 8, 8, 1) and images.dtype == np.uint8
    assert labels.dtype == np.int32 and set(labels) == set(range(8))
    by_kind = images.reshape(kinds, count, 8, 8, 1)
    for rendition in by_kind:
        assert rendition.min() == 0 and rendition.max() == 255
        change = np.abs(rendition.astype(float) - originals[kept]).mean(axis=(1, 2, 3))
        assert change.min() > 5
    for numbers in labels.reshape(kinds, count):
        np.testing.assert_array_equal(np.asarray(source.classes)[numbers], classes[kept])
    ink = dict(zip(digits.RENDITIONS, by_kind.mean(axis=(1, 2, 3, 4)), strict=True))
    assert ink["thinned"] < originals[kept].mean() < ink["thickened"]


def test_digit_renditions_are_the_same_in_every_process():
    images, labels = digits.load_renditions()
    digits.load_renditions.cache_clear()
    again, same = digits.load_renditions()
    assert again is not images
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, same)
    assert not images.flags.writeable


def test_digit_renditions_have_only_a_test_split():
    config = DataConfig(source="digits_r", labels=8)
    assert len(load_source(config, "test")) == 286 * 5
    with pytest.raises(ValueError, match=r"'digits_r' has no split 'train', only \['test'\]"):
        load_source(config, "train")
    with pytest.raises(ValueError, match=r"config\.ood\.split"):
        load_ood(DataConfig(), OodConfig("digits_r", split="val"), label_names=DIGITS)


def make_folder(root, classes, *, side=36, images=2):
    rng = np.random.default_rng(0)
    for split, name in itertools.product(("train", "test"), classes):
        (root / split / name).mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 256, (side, side + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_folder_with_fewer_classes_is_matched_to_training_set(tmp_path):
    base = make_folder(tmp_path / "base", ("ant", "bee", "cat", "dog"))
    fewer = make_folder(tmp_path / "r", ("bee", "dog"), images=3)
    data = DataConfig("folder", str(base), 36, 3, 4, (0.5,) * 3, (0.5,) * 3)
    config = dataclasses.replace(
        tiny_config("end_to_end", optim=OptimConfig(steps=1, batch=4)),
        data=data,
        ood=OodConfig("folder", str(fewer)),
    )
    feed = feed_of(config, tmp_path)
    assert feed.ood_classes == (1, 3)
    batches = list(feed.ood())
    assert [batch["image"].shape for batch in batches] == [(4, 36, 36, 3)] * 2
    np.testing.assert_array_equal(
        np.concatenate([b["label"] for b in batches])[:6], [0] * 3 + [1] * 3
    )
    np.testing.assert_array_equal(np.concatenate([b["_mask"] for b in batches]), [1] * 6 + [0] * 2)

    wrong = make_folder(tmp_path / "wrong", ("bee", "eel"))
    with pytest.raises(
        ValueError, match=r"config\.data lacks 1 of them: eel; .*ant, bee, cat, dog"
    ):
        load_ood(data, OodConfig("folder", str(wrong)), label_names=("ant", "bee", "cat", "dog"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_per_class_limits_do_not_apply_to_ood_set(tmp_path, split):
    root = make_folder(tmp_path / "r", ("bee", "dog"), images=3)
    data = DataConfig(channels=3, image_size=36, mean=(0.5,) * 3, std=(0.5,) * 3)
    data = dataclasses.replace(data, per_class=1, test_per_class=2)
    found = load_ood(data, OodConfig("folder", str(root), split), label_names=("bee", "cat", "dog"))
    assert found.source.labels.tolist() == [0, 0, 0, 1, 1, 1] and found.classes == (0, 2)


WNIDS = ("n01", "n02", "n03", "n04")
RGB = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def renditions(root, classes=WNIDS):
    """Folders with two images per class, in ImageNet-R's layout."""
    make_folder(root.parent / f"{root.name}_splits", classes, side=80)
    (root.parent / f"{root.name}_splits" / "test").rename(root)
    return root


def test_imagenet_r_reads_wnid_folders(tmp_path):
    root = renditions(tmp_path / "imagenet-r", ("n02", "n04"))
    data = DataConfig(image_size=64, labels=4, **RGB)
    found = load_ood(data, OodConfig("imagenet_r", str(root)), label_names=WNIDS)
    assert found.classes == (1, 3) and found.source.label_names == ("n02", "n04")
    assert found.source[3]["image"].shape == (80, 81, 3) and found.source[3]["label"] == 1
    with pytest.raises(ValueError, match=r"config\.data lacks \d+ of them: n04"):
        load_ood(data, OodConfig("imagenet_r", str(root)), label_names=WNIDS[:3])
    with pytest.raises(ValueError, match=r"only \['test'\].*config\.ood\.split"):
        load_ood(data, OodConfig("imagenet_r", str(root), split="val"), label_names=WNIDS)


def test_tiny_imagenet_r_is_imagenet_r_limited_to_tiny_imagenet_classes(tmp_path):
    root, base = renditions(tmp_path / "imagenet-r"), ("n00", "n02", "n04", "n07")
    data = DataConfig(image_size=64, labels=4, **RGB)
    ood = OodConfig("tiny_imagenet_r", str(root))
    found = load_ood(data, ood, label_names=base)
    assert found.classes == (1, 2) and found.data.labels == 2
    assert found.source.label_names == ("n02", "n04")
    np.testing.assert_array_equal(found.source.labels, [0, 0, 1, 1])
    for i, name in enumerate(("n02/0", "n02/1", "n04/0", "n04/1")):
        with Image.open(root / f"{name}.png") as image:
            small = image.resize((64, 64), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found.source[i]["image"], np.asarray(small))
        assert found.source[i]["label"] == i // 2
    with pytest.raises(ValueError, match=r"config\.data lacks 4 of them"):
        load_ood(data, ood, label_names=("n08", "n09"))


def test_class_list_selects_classes(tmp_path):
    root, names = renditions(tmp_path / "imagenet-r"), tmp_path / "classes.txt"
    data = DataConfig(image_size=64, labels=4, **RGB)
    ood = OodConfig("imagenet_r", str(root), classes=str(names))
    names.write_text("n04\n\nn01\n")
    found = load_ood(data, ood, label_names=("n04", "n01"))
    assert found.source.label_names == ("n01", "n04") and found.classes == (1, 0)
    np.testing.assert_array_equal(found.source.labels, [0, 0, 1, 1])
    for text, message in (
        ("n04\nn09\n", r"config\.ood\.classes=.*names 1 classes .* lacks: n09"),
        ("n04\nn04\n", r"classes\.txt: these names .*more than once: n04"),
        ("\n", r"classes\.txt has no class names"),
    ):
        names.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_ood(data, ood, label_names=WNIDS)
    names.write_bytes(b"n01\nn\xff\n")
    with pytest.raises(ValueError, match=r"classes\.txt is not UTF-8 .*byte 5\)"):
        load_ood(data, ood, label_names=WNIDS)
    names.unlink()
    with pytest.raises(FileNotFoundError, match=r"classes\.txt, the list of class names"):
        load_ood(data, ood, label_names=WNIDS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_per_class_limits_only_training_and_test_sets(tmp_path, split):
    root = make_folder(tmp_path / "r", ("bee", "dog"), images=3)
    data = DataConfig("folder", "elsewhere", 36, 3, 4, (0.5,) * 3, (0.5,) * 3)
    data = dataclasses.replace(data, per_class=1, test_per_class=2)
    ood = OodConfig("folder", str(root), split=split)
    found = load_ood(data, ood, label_names=("bee", "cat", "dog"))
    assert len(found.source) == 6 and found.classes == (0, 2)
    assert (found.data.path, found.data.source, found.data.labels) == (str(root), "folder", 2)
    assert (found.data.image_size, found.data.mean) == (36, (0.5,) * 3)


def test_class_list_applies_only_to_its_own_set(tmp_path):
    """The first and last of three classes, which changes the last one's label."""
    root, names = renditions(tmp_path / "r", ("n01", "n02", "n03")), tmp_path / "classes.txt"
    names.write_text("n01\nn03\n")
    data = DataConfig(image_size=64, labels=4, **RGB)
    ood = OodConfig("imagenet_r", str(root), classes=str(names))
    found = load_ood(data, ood, label_names=WNIDS)
    assert found.classes == (0, 2) and found.source.labels.tolist() == [0, 0, 1, 1]
    pixels = [found.source[i]["image"] for i in range(4)]
    for image, name in zip(pixels, ("n01/0", "n01/1", "n03/0", "n03/1"), strict=True):
        with Image.open(root / f"{name}.png") as picture:
            np.testing.assert_array_equal(image, np.asarray(picture))


@pytest.mark.parametrize(
    ("ood", "message"),
    [
        (OodConfig("folder", "/nowhere"), r"config\.ood\.path='/nowhere' does not exist"),
        (OodConfig("folder", "."), r"config\.ood\.path.*no split.*config\.ood\.split"),
    ],
)
def test_missing_set_is_named_by_its_own_key(tmp_path, monkeypatch, ood, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message) as error:
        load_ood(DataConfig(), ood, label_names=DIGITS)
    assert "config.data" not in str(error.value)


def test_an_unknown_source_is_named():
    with pytest.raises(ValueError, match=r"^source='digitsr'.*did you mean 'digits_r'"):
        OodConfig(source="digitsr")


def test_a_run_evaluates_its_ood_set_among_its_classes(tmp_path):
    optim = OptimConfig(steps=6, batch=400, lr=1e-2, lr_per=None, warmup_epochs=0)
    config = dataclasses.replace(tiny_config("end_to_end", optim=optim), ood=DIGITS_R)
    kernel = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)

    def forward(params, helpers, images, train, rngs):
        logits = images.reshape(len(images), 64) @ kernel
        return {"net": Outputs(logits + 0 * params["net"]["bias"], None, {})}

    training = Training(
        PHASES[config.phase],
        config,
        init=lambda key: {"net": {"bias": jnp.zeros(10)}},
        rules=(("/net/bias", PartitionSpec()),),
        forward=forward,
    )
    result = train_phase(
        training, tmp_path, make_mesh(MeshConfig()), feed=config_feed(training, tmp_path)
    )
    images, labels = digits.load_renditions()
    logits = ((images.reshape(-1, 64) / 255 - 0.5) / 0.5) @ kernel.astype(float)
    expected = naive(logits, labels, (0, 1, 2, 3, 4, 5, 7, 8))
    found = [result[f"ood/{name}"] for name in ("accuracy", "accuracy_top5", "loss")]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_an_episode_has_no_ood_set(tmp_path):
    few_shot = FewShotConfig(ways=3, shots=2, test_shots=2)
    config = tiny_config("few_shot", optim=OptimConfig(batch=6))
    config = dataclasses.replace(config, few_shot=few_shot, ood=DIGITS_R)
    episode = dataclasses.replace(config, data=dataclasses.replace(config.data, labels=3))
    assert episode_feed(episode, load_splits(config), workdir=tmp_path).ood is None
    whole = dataclasses.replace(config, phase="end_to_end")
    assert feed_of(whole, tmp_path).ood is not None


def test_results_table_has_ood_column_if_a_run_has_ood(tmp_path):
    plain = {"steps": 5, "test/accuracy": 0.5, "test/loss": 1.0}
    for folder, result in (("a", plain), ("b", plain | {"ood/accuracy": 0.25})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "result.json").write_text(json.dumps(result))
    table = results_table(tmp_path, ["a", "b"])
    assert table.header[-1] == "OOD accuracy"
    assert [row[-1] for row in table.rows] == ["none", "25.0 %"]
    assert results_table(tmp_path, ["a"]).header[-1] == "test loss"
    assert results_table(tmp_path, []) is None
