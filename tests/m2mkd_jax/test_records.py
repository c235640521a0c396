"""Sets whose labels are in records or lists: TFDS's ArrayRecords and Tiny-ImageNet."""

import dataclasses
import io
import json
import pickle
import shutil
import sys

import numpy as np
import prepare_data
import pytest
from PIL import Image

from common_jax.inputs import BadExample, train_batches
from m2mkd_jax.data.files import records
from m2mkd_jax.data.ood import OodConfig, load_ood
from m2mkd_jax.data.sources import DataConfig, load_source

RGB = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
NAMES = ("ant", "bee", "cat")
SIZE = 10


def encoded(seed, *, side=12, form="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form)
    return content.getvalue()


def prepared(root, *, labels=None, names=NAMES, version="1.0.0", file_format="array_record"):
    """A set "pets" with ten images in two files, written without TensorFlow. Image i is encoded(i)
    and has label i % 3. Its masks, which are never read, cannot be decoded."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    labels = [i % len(names) for i in range(SIZE)] if labels is None else labels
    folder = root / "pets" / version
    folder.mkdir(parents=True)
    tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(names)),
            "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        }
    ).save_config(folder)
    for shard in range(2):
        path = folder / f"pets-train.array_record-0000{shard}-of-00002"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for i in range(5 * shard, 5 * shard + 5):
            image = tf_feature_pb2.BytesList(value=[encoded(i)])
            mask = tf_feature_pb2.BytesList(value=[b"no picture"])
            label = tf_feature_pb2.Int64List(value=[labels[i]])
            features = {
                "image": tf_feature_pb2.Feature(bytes_list=image),
                "label": tf_feature_pb2.Feature(int64_list=label),
                "mask": tf_feature_pb2.Feature(bytes_list=mask),
            }
            example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
            writer.write(example.SerializeToString())
        writer.close()
    split = {
        "name": "train",
        "shardLengths": ["5", "5"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "pets", "version": version, "fileFormat": file_format, "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def config_of(root, **settings):
    settings = {"image_size": 12, "labels": 3, "name": "pets", "in_memory": "never"} | settings
    return DataConfig(source="tfds", path=str(root), **RGB, **settings)


def test_array_records_are_read_without_tensorflow(tmp_path):
    folder = prepared(tmp_path)
    source = load_source(config_of(tmp_path), "train")
    assert len(source) == SIZE and source.arrays is None and source.label_names == NAMES
    np.testing.assert_array_equal(source.labels, np.arange(SIZE) % 3)
    assert source.labels.dtype == np.int32
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i in (0, 4, 5, 9):
            with Image.open(io.BytesIO(encoded(i))) as image:
                np.testing.assert_array_equal(copy[i]["image"], np.asarray(image))
            assert copy[i]["label"] == i % 3
    assert source.name(7) == f"{folder}/pets-train.array_record-00001-of-00002, record 2"
    assert "tensorflow" not in sys.modules
    batch = next(train_batches(source, transform=None, seed=0, batch=5))
    assert batch["image"].shape == (5, 12, 12, 3)


def test_small_records_of_one_size_stay_in_memory(tmp_path):
    prepared(tmp_path)
    source = load_source(config_of(tmp_path, in_memory="auto"), "train")
    with Image.open(io.BytesIO(encoded(8))) as image:
        np.testing.assert_array_equal(source.arrays["image"][8], np.asarray(image))
    np.testing.assert_array_equal(source.arrays["label"], np.arange(SIZE) % 3)


def test_split_slices_have_their_own_labels(tmp_path, caplog):
    folder = prepared(tmp_path)
    for split, places in (
        ("train[2:7]", range(2, 7)),
        ("train[:2]+train[8:]", (0, 1, 8, 9)),
        ("train[80%:]", (8, 9)),
    ):
        source = load_source(config_of(tmp_path), split)
        np.testing.assert_array_equal(source.labels, [i % 3 for i in places])
        for own, whole in enumerate(places):
            with Image.open(io.BytesIO(encoded(whole))) as image:
                np.testing.assert_array_equal(source[own]["image"], np.asarray(image))
            shard, record = divmod(whole, 5)
            name = f"pets-train.array_record-0000{shard}-of-00002, record {record}"
            assert source.name(own) == f"{folder}/{name}"
    assert "'train[80%:]' has no image for 1 classes" in caplog.text


def test_labels_are_cached_and_reread_for_other_records(tmp_path, monkeypatch, capsys):
    folder = prepared(tmp_path)
    assert prepare_data.main(["pets", "--data-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"pets/1.0.0 in {folder}: 3 classes" in printed
    assert "train: 10 images in 2 files, 3 to 4 a class; labels-train.npz" in printed
    with monkeypatch.context() as patch:
        patch.setattr(records, "_read_labels", None)  # fails if it is called
        load_source(config_of(tmp_path), "train")
    other = prepared(tmp_path / "other", labels=[2] * 5 + [0, 1, 1, 1, 1])
    shutil.copy(folder / "labels-train.npz", other)
    labels = load_source(config_of(tmp_path / "other"), "train").labels
    np.testing.assert_array_equal(labels, [2] * 5 + [0, 1, 1, 1, 1])


def test_an_ood_set_of_records_has_its_own_name(tmp_path):
    prepared(tmp_path)
    data = DataConfig("tfds", "/elsewhere", 12, labels=4, name="fish", **RGB)
    ood = OodConfig("tfds", str(tmp_path), "train", "pets")
    found = load_ood(data, ood, label_names=("bee", "cat", "dog", "ant"))
    assert len(found.source) == SIZE and found.classes == (3, 0, 1)
    with pytest.raises(FileNotFoundError, match=r"config\.ood\.path=.* config\.ood\.name='dogs'"):
        load_ood(data, dataclasses.replace(ood, name="dogs"), label_names=NAMES)


def test_labels_are_read_in_chunks_of_records(tmp_path, monkeypatch):
    labels = [0, 1, 2, 2, 0, 1, 1, 0, 2, 2]
    prepared(tmp_path, labels=labels)
    monkeypatch.setattr(records, "CHUNK", 3)
    assert load_source(config_of(tmp_path), "train").labels.tolist() == labels


@pytest.mark.parametrize("changed", [0, 9])
def test_labels_are_reread_if_any_file_differs(tmp_path, changed):
    """In a set with equally many bytes, only the first or the last file differs."""
    kept = prepared(tmp_path)
    load_source(config_of(tmp_path), "train")
    labels = [i % 3 for i in range(SIZE)]
    labels[changed] = 2
    other = prepared(tmp_path / "other", labels=labels)
    shutil.copy(kept / "labels-train.npz", other)
    assert load_source(config_of(tmp_path / "other"), "train").labels.tolist() == labels


def test_corrupt_label_cache_is_rebuilt(tmp_path, caplog):
    folder = prepared(tmp_path)
    right = load_source(config_of(tmp_path), "train").labels
    file = folder / "labels-train.npz"
    whole = file.read_bytes()
    with np.load(io.BytesIO(whole)) as stored:
        fingerprint = stored["fingerprint"]
    broken = [b"", b"x", whole[:-40], whole[:100] + b"\xff" * 60 + whole[160:]]
    for labels in (right[:-1], right.astype(np.float32), np.array([{}])):
        content = io.BytesIO()
        np.savez(content, labels=labels, fingerprint=fingerprint)
        broken.append(content.getvalue())
    for number, content in enumerate(broken, start=1):
        file.write_bytes(content)
        np.testing.assert_array_equal(load_source(config_of(tmp_path), "train").labels, right)
        assert file.read_bytes() == whole
        assert caplog.text.count("labels-train.npz cannot be read") == number


def test_corrupt_dataset_info_is_refused(tmp_path):
    folder = prepared(tmp_path)
    for name in ("dataset_info.json", "features.json"):
        whole = (folder / name).read_bytes()
        for content in (b"", b"[1]", b"{", whole.replace(b":", b";"), b"[" * 10_000):
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=r"1\.0\.0 (cannot be opened|has the features)"):
                load_source(config_of(tmp_path), "train")
        (folder / name).write_bytes(whole)


def test_find_prepared_takes_latest_or_requested_version(tmp_path):
    prepared(tmp_path, version="2.0.0")
    prepared(tmp_path, version="10.0.0")
    assert records.find_prepared(str(tmp_path), "pets").name == "10.0.0"
    assert records.find_prepared(str(tmp_path), "pets:2.0.0").name == "2.0.0"
    assert records.find_prepared(str(tmp_path / "pets/2.0.0"), "").name == "2.0.0"
    with pytest.raises(FileNotFoundError, match=r"pets/3\.0\.0.*10\.0\.0, 2\.0\.0.*prepare_data"):
        records.find_prepared(str(tmp_path), "pets:3.0.0")


def test_missing_sets_splits_and_files_are_named(tmp_path):
    folder = prepared(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"name='dogs' \(there: pets\).*prepare_data\.py dogs"
    ):
        load_source(config_of(tmp_path, name="dogs"), "train")
    with pytest.raises(FileNotFoundError, match=r"no split 'val', only: train, .*test_split"):
        load_source(config_of(tmp_path), "val")
    with pytest.raises(ValueError, match=r"^name='pets' is for .*'tfds'"):
        DataConfig(name="pets")
    next(folder.glob("*00001-of*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files are missing: .*00001-of-00002"):
        load_source(config_of(tmp_path), "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": [-1] * SIZE}, r"labels \[-1\] are not from 0 to 2; .*test split"),
        ({"labels": [0, 1] * 5}, r"no image for class cat"),
        ({"file_format": "tfrecord"}, r"was prepared as tfrecord, .*tools/prepare_data\.py pets"),
    ],
)
def test_sets_that_cannot_be_trained_on_are_refused(tmp_path, settings, message):
    prepared(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        load_source(config_of(tmp_path), "train")


def test_wrong_features_and_duplicate_class_names_are_refused(tmp_path):
    folder = prepared(tmp_path)
    (folder / "label.labels.txt").write_text("ant\nbee\nant\n")
    with pytest.raises(ValueError, match=r"pets/1\.0\.0, names of .* more than once: ant"):
        load_source(config_of(tmp_path), "train")
    (folder / "features.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pets/1\.0\.0 cannot be opened.*prepare it again"):
        load_source(config_of(tmp_path), "train")
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds.features.FeaturesDict({"image": tfds.features.Image(), "mask": np.int64}).save_config(
        folder
    )
    with pytest.raises(ValueError, match=r"'mask': 'Tensor'.*but needs .*label: ClassLabel"):
        load_source(config_of(tmp_path), "train")


def test_corrupt_record_file_is_named(tmp_path):
    folder = prepared(tmp_path)
    load_source(config_of(tmp_path), "train")
    shard = next(folder.glob("*00001-of*"))
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    shard.write_bytes(damaged)
    source = load_source(config_of(tmp_path), "train")
    assert source[4]["label"] == 1
    with pytest.raises(BadExample, match=r"00001-of-00002, record 2: RuntimeError.*[Cc]orrupted"):
        source[7]
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"records 0 to 9: .*again: .*00001-of-00002"):
        load_source(config_of(tmp_path), "train")


@pytest.mark.parametrize("chunk", [3, 5, 10])
def test_files_of_unreadable_records_are_named_without_the_others(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    folder = prepared(tmp_path)
    next(folder.glob("*00001-of*")).write_bytes(b"")
    start = {3: 3, 5: 5, 10: 0}[chunk]
    with pytest.raises(ValueError, match=rf"records {start} to {start + chunk - 1}: ") as error:
        load_source(config_of(tmp_path), "train")
    message = str(error.value)
    assert "00001-of-00002" in message and ("00000-of-00002" in message) == (chunk != 5)


def test_truncated_image_is_a_bad_example(tmp_path, monkeypatch):
    cut = encoded(6)[:60]
    monkeypatch.setitem(globals(), "encoded", lambda i, plain=encoded: cut if i == 6 else plain(i))
    folder = prepared(tmp_path)
    for in_memory in ("never", "auto"):
        source = load_source(config_of(tmp_path, in_memory=in_memory), "train")
        assert source.arrays is None
        with pytest.raises(BadExample, match="00001-of-00002, record 1: ") as error:
            source[6]
        assert error.value.name.startswith(str(folder))
        report = tmp_path / f"{in_memory}.jsonl"
        settings = {"transform": None, "seed": 0, "batch": 10, "report_path": report}
        assert next(train_batches(source, bad_share=0.1, **settings))["label"].shape == (10,)
        assert "record 1" in report.read_text()
        with pytest.raises(ValueError, match=r"1 bad examples of 10.*config\.data\.bad_share"):
            next(train_batches(source, bad_share=0.05, **settings))


def test_preparing_without_tensorflow_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as if it were not installed
    assert prepare_data.main(["cifar10", "--data-dir", str(tmp_path)]) == 2
    assert "pip install -e '.[prepare]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    prepared_folder = tmp_path / "cifar10/3.0.2"
    prepared_folder.mkdir(parents=True)
    (prepared_folder / "dataset_info.json").write_text("{}")
    with pytest.raises(ImportError, match=r"config\.data\.source='tfds'.*\[tfds\]"):
        load_source(config_of(tmp_path, name="cifar10"), "train")


WNIDS = ("n03", "n01", "n02")  # wnids.txt is not sorted


def tiny_imagenet(root):
    """Three classes with two training images each, and four images for validation."""
    root.mkdir()
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    for number, wnid in enumerate(WNIDS):
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        for i in range(2):
            (images / f"{wnid}_{i}.JPEG").write_bytes(encoded(10 * number + i, side=64))
        (images.parent / f"{wnid}_boxes.txt").write_text("")
    (root / "val/images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate(("n02", "n03", "n01", "n01")):
        (root / f"val/images/val_{i}.JPEG").write_bytes(encoded(100 + i, side=64))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t1\t62\t63\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    return DataConfig("tiny_imagenet", str(root), 64, labels=3, **RGB)


def test_tiny_imagenet_in_its_published_layout(tmp_path):
    config = tiny_imagenet(tmp_path / "set")
    train, val = load_source(config, "train"), load_source(config, "val")
    assert train.label_names == val.label_names == ("n01", "n02", "n03")
    np.testing.assert_array_equal(train.labels, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(val.labels, [1, 2, 0, 0])
    for source, i, seed in ((train, 0, 10), (train, 5, 1), (val, 2, 102)):
        with Image.open(io.BytesIO(encoded(seed, side=64))) as image:
            np.testing.assert_array_equal(source[i]["image"], np.asarray(image))
    assert val.arrays["image"].shape == (4, 64, 64, 3)
    with pytest.raises(ValueError, match="no split 'test' with labels, only train and val"):
        load_source(config, "test")


def test_tiny_imagenet_annotations_in_any_order(tmp_path):
    config = tiny_imagenet(tmp_path / "set")
    path = tmp_path / "set/val/val_annotations.txt"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*others, first]))
    val = load_source(config, "val")
    np.testing.assert_array_equal(val.labels, [1, 2, 0, 0])
    with Image.open(io.BytesIO(encoded(101, side=64))) as image:
        np.testing.assert_array_equal(val[1]["image"], np.asarray(image))


def test_tiny_imagenet_with_wrong_lists_is_refused(tmp_path):
    root = tmp_path / "set"
    config = tiny_imagenet(root)
    annotations = root / "val/val_annotations.txt"
    lines = annotations.read_text()
    for text, message in (
        (lines + "val_9.JPEG\tn09\t0\n", r"not among its 3 classes: n09"),
        (lines + "val_0.JPEG\tn01\t0\n", r"val_annotations\.txt.*more than once: val/images/val_0"),
        (lines + "val_9.JPEG n01\n", r"val_annotations\.txt, line 5 must have FILE, tab, WNID"),
        (lines.replace("n03", "n01"), r"no image for class n03"),
    ):
        annotations.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_source(config, "val")
    annotations.write_bytes(b"val_0.JPEG\tn\xff1\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt is not UTF-8 .*byte 12\).*iconv"):
        load_source(config, "val")
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations\.txt is missing; .*'folder'"):
        load_source(config, "val")
    (root / "wnids.txt").write_text("n01\nn02\nn03\nn01\n")
    with pytest.raises(ValueError, match=r"wnids\.txt: these names .*more than once: n01"):
        load_source(config, "train")
    (root / "wnids.txt").write_text("n01\nn02\nn03\nn04\n")
    with pytest.raises(FileNotFoundError, match=r"no folder for 1 of the 4 classes .*: n04"):
        load_source(config, "train")
    (root / "wnids.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"wnids\.txt, the list of class names, is missing"):
        load_source(config, "train")
