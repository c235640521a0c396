"""iNaturalist in its published layout, and JSON files with faults."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from common_jax.inputs import BadExample
from m2mkd_jax.data.own import discover
from m2mkd_jax.data.sources import DataConfig, load_source

RGB = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def encoded(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def inaturalist(root, **changes):
    """Three species with two images each in train2018.json."""
    (root / "train_val2018/Birds").mkdir(parents=True)
    images, annotations = [], []
    for i in range(6):
        name = f"train_val2018/Birds/{i}.jpg"
        (root / name).write_bytes(encoded(i))
        images.append({"id": 50 + i, "file_name": name, "width": 12})
        annotations.append({"id": i, "image_id": 50 + i, "category_id": (7, 2, 9)[i % 3]})
    categories = [{"id": number, "name": f"Avis {number}"} for number in (9, 2, 7)]
    record = {"images": images, "annotations": annotations, "categories": categories} | changes
    (root / "train2018.json").write_text(json.dumps(record))
    return DataConfig("inaturalist", str(root), 12, labels=3, **RGB)


@pytest.mark.parametrize("split", ["train", "train2018"])
def test_inaturalist_labels_come_from_the_json(tmp_path, split):
    source = load_source(inaturalist(tmp_path), split)
    assert source.label_names == ("Avis 2", "Avis 7", "Avis 9")
    np.testing.assert_array_equal(source.labels, [1, 0, 2, 1, 0, 2])
    with Image.open(io.BytesIO(encoded(4))) as image:
        np.testing.assert_array_equal(source[4]["image"], np.asarray(image))


def test_inaturalist_lists_in_any_order(tmp_path):
    """Images are found by id, and sorted by file name."""
    inaturalist(tmp_path)
    path = tmp_path / "train2018.json"
    record = json.loads(path.read_text())
    for name, step in (("images", 5), ("annotations", -1)):
        record[name] = [record[name][step * i % 6] for i in range(6)]
    path.write_text(json.dumps(record))
    config = DataConfig("inaturalist", str(tmp_path), 12, labels=3, **RGB)
    source = load_source(config, "train")
    assert source.labels.tolist() == [1, 0, 2, 1, 0, 2]
    with Image.open(io.BytesIO(encoded(1))) as image:
        np.testing.assert_array_equal(source[1]["image"], np.asarray(image))


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("images", {"id": 50, "file_name": "b.jpg"}, r"image ids: .*more than once: 50; make"),
        ("images", {"id": 60, "file_name": 5}, "TypeError 5 is not text; download"),
        ("annotations", {"image_id": 50, "category_id": [7]}, r"TypeError \[7\] is not an id"),
        (
            "annotations",
            {"image_id": 50, "category_id": 2},
            r"files with several classes or ids: .*: train_val2018/Birds/0\.jpg; make",
        ),
        ("categories", {"id": 7, "name": "Avis 8"}, r"category ids: .*more than once: 7; make"),
    ],
)
def test_an_image_has_one_id_and_one_class(tmp_path, key, entry, message):
    config = inaturalist(tmp_path)
    path = tmp_path / "train2018.json"
    record = json.loads(path.read_text())
    record[key].append(entry)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"train2018\.json.* {message}"):
        load_source(config, "train")


def test_repeated_records_count_once(tmp_path):
    config = inaturalist(tmp_path)
    path = tmp_path / "train2018.json"
    record = json.loads(path.read_text())
    record |= {key: record[key] * 2 for key in ("images", "annotations")}
    path.write_text(json.dumps(record))
    assert len(load_source(config, "train")) == 6


def test_settings_of_inaturalist_are_detected(tmp_path):
    inaturalist(tmp_path)
    shutil.copy(tmp_path / "train2018.json", tmp_path / "val2018.json")
    found = discover.settings_of(str(tmp_path), vars(DataConfig()))
    splits = {"train_split": "train2018", "test_split": "val2018"}
    assert found.items() >= ({"source": "inaturalist", "labels": 3} | splits).items()


def test_inaturalist_with_wrong_records_is_refused(tmp_path):
    twice = [{"id": 2, "name": "A"}, {"id": 7, "name": "A"}, {"id": 9, "name": "B"}]
    for number, (changes, message) in enumerate(
        (
            ({"categories": twice}, r"train2018\.json: these names .*more than once: A"),
            (
                {"categories": twice[1:]},
                r"train2018\.json: labels that are not among its 2 classes: 2",
            ),
            ({"images": []}, r"annotations of images that it lacks: 50, 51"),
            ({"annotations": None}, r"train2018\.json is not a complete file with images"),
            (
                {"annotations": [{"image_id": []}]},
                r"train2018\.json is not a complete file with images",
            ),
        )
    ):
        with pytest.raises(ValueError, match=message):
            load_source(inaturalist(tmp_path / str(number), **changes), "train")
    config = inaturalist(tmp_path / "nested")
    (tmp_path / "nested/train2018.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"train2018\.json is JSON that is nested too deep; down"):
        load_source(config, "train")
    config = inaturalist(tmp_path / "years")
    shutil.copy(tmp_path / "years/train2018.json", tmp_path / "years/train2019.json")
    with pytest.raises(FileNotFoundError, match=r"several years.*train2018\.json, train2019\.json"):
        load_source(config, "train")
    with pytest.raises(FileNotFoundError, match=r"split 'val': no such file"):
        load_source(config, "val")
    (tmp_path / "years/train_val2018/Birds/3.jpg").unlink()
    with pytest.raises(BadExample, match=r"Birds/3\.jpg: FileNotFoundError"):
        load_source(config, "train2018")[3]
