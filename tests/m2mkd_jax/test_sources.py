"""Image sources and the host's transforms, on images drawn here."""

import itertools
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from common_jax.inputs import BadExample, eval_batches, train_batches
from m2mkd_jax.data import transforms
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.sources import DataConfig, load_source, load_test_source
from m2mkd_jax.data.subsets import Subset

CLASSES = ("cat", "dog", "owl")
RGB = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def picture(seed, height=40, width=50):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


@pytest.fixture
def folder(tmp_path):
    """Two splits with three classes of five images each, in several types and sizes."""
    root = tmp_path / "set"
    for split, name in itertools.product(("train", "val"), CLASSES):
        (root / split / name).mkdir(parents=True)
        for number, suffix in enumerate(("jpg", "jpeg", "png", "JPEG", "png")):
            image = picture((len(split), CLASSES.index(name), number), height=40 + 3 * number)
            image.save(root / split / name / f"{number}.{suffix}")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    return root


def config_of(path, **settings):
    settings = {"image_size": 36, "labels": 3, "test_split": "val"} | RGB | settings
    return DataConfig(source="folder", path=str(path), **settings)


def zipped(folder, path, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):  # not in sorted order
            archive.write(file, file.relative_to(folder))
    return path


def test_digits_are_complete_and_in_memory():
    train, test = (load_source(DataConfig(), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    images = np.concatenate([train.arrays["image"], test.arrays["image"]])
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8 and images.min() == 0 and images.max() == 255
    assert len(np.unique(images)) == 17
    assert train.label_names == tuple("0123456789")
    assert set(train.labels) == set(range(10))
    one = train[7]
    assert one["image"].shape == (8, 8, 1) and one["label"].dtype == np.int32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "fodler"}, r"^source='fodler'.*did you mean 'folder'"),
        ({"channels": 2}, r"^channels=2"),
        ({"mean": (0.5, 0.5)}, r"^mean"),
        ({"std": (0.0,)}, r"^std"),
        ({"labels": 0}, r"^labels=0"),
        ({"workers": -1}, r"^workers=-1"),
        ({"bad_share": 1.0}, r"^bad_share=1.0"),
    ],
)
def test_invalid_config_names_its_key(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize("settings", [{"image_size": 16}, {"labels": 9}])
def test_digits_refuse_another_shape(settings):
    key = next(iter(settings))
    with pytest.raises(ValueError, match=rf"config\.data\.{key}=.*does not fit"):
        load_source(DataConfig(**settings), "train")
    with pytest.raises(ValueError, match=r"'val'.*'test', 'train'"):
        load_source(DataConfig(), "val")


def test_folder_reads_every_image_and_nothing_else(folder):
    source = load_source(config_of(folder), "train")
    assert len(source) == 15 and source.arrays is None
    assert source.label_names == CLASSES
    np.testing.assert_array_equal(np.bincount(source.labels), [5, 5, 5])
    at = source.files.names.index("train/dog/2.png")
    with Image.open(folder / "train/dog/2.png") as image:
        np.testing.assert_array_equal(source[at]["image"], np.asarray(image))
    assert source[at]["label"] == 1


def test_grey_images_have_one_channel(folder):
    grey = load_source(config_of(folder, channels=1, mean=(0.5,), std=(0.5,)), "val")
    assert grey[0]["image"].shape == (40, 50, 1)


@pytest.mark.parametrize("copied", [False, True])
def test_zip_equals_folder(folder, tmp_path, copied):
    path = zipped(folder, tmp_path / "set.zip")
    from_folder = load_source(config_of(folder), "train")
    from_zip = load_source(config_of(path), "train")
    if copied:
        from_zip = pickle.loads(pickle.dumps(from_zip))
    assert from_zip.files.names == from_folder.files.names
    np.testing.assert_array_equal(from_zip.labels, from_folder.labels)
    for index in range(len(from_folder)):
        np.testing.assert_array_equal(from_zip[index]["image"], from_folder[index]["image"])


def test_threads_share_a_zip(folder, tmp_path):
    config = config_of(zipped(folder, tmp_path / "set.zip"))
    source, transform = (
        load_source(config, "train"),
        transforms.train_transform(config, AugmentConfig(flip=True, randaugment=True)),
    )
    batches = [
        next(train_batches(source, transform=transform, seed=1, batch=12, workers=workers))
        for workers in (0, 4)
    ]
    np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])
    assert batches[0]["image"].shape == (12, 36, 36, 3)
    assert batches[0]["image"].dtype == np.uint8 and batches[0]["label"].dtype == np.int32


def test_compressed_or_truncated_zip_is_refused_by_name(folder, tmp_path):
    packed = zipped(folder, tmp_path / "packed.zip", zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"packed\.zip.*cat/0\.jpg.*zip -0"):
        load_source(config_of(packed), "train")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(zipped(folder, tmp_path / "set.zip").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.zip.*make the zip again"):
        load_source(config_of(cut), "train")


def test_a_flipped_byte_in_a_zip_is_a_bad_example(folder, tmp_path):
    path = zipped(folder, tmp_path / "set.zip")
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("train/cat/0.jpg").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 400] ^= 255
    path.write_bytes(content)
    with pytest.raises(BadExample, match=r"train/cat/0\.jpg.*checksum"):
        load_source(config_of(path), "train")[0]


def test_missing_paths_and_splits_list_what_exists(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.data\.path=.*nowhere.*beside it: set"):
        load_source(config_of(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match=r"config\.data\.path=''"):
        load_source(config_of(""), "train")
    far = tmp_path / "set" / "no" / "such"
    with pytest.raises(FileNotFoundError, match=r"no/such' does not exist.*; in '.*/set': train,"):
        load_source(config_of(far), "train")
    with pytest.raises(FileNotFoundError, match=r"path='~nobody-here/x' does not exist"):
        load_source(config_of("~nobody-here/x"), "train")
    for path in (folder, zipped(folder, tmp_path / "set.zip")):
        with pytest.raises(FileNotFoundError, match=r"no split 'test', only: train, val"):
            load_source(config_of(path), "test")


@pytest.mark.parametrize("inside", ["train/", ""])
def test_folder_with_one_zip_per_split(folder, tmp_path, inside):
    root = tmp_path / "zips"
    root.mkdir()
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for file in (folder / "train").rglob("*"):
            archive.write(file, inside + str(file.relative_to(folder / "train")))
    from_folder = load_source(config_of(folder), "train")
    from_zip = load_source(config_of(root), "train")
    assert from_zip.label_names == CLASSES
    np.testing.assert_array_equal(from_zip.labels, from_folder.labels)
    for index in range(len(from_folder)):
        np.testing.assert_array_equal(from_zip[index]["image"], from_folder[index]["image"])
    with pytest.raises(FileNotFoundError, match="no split 'val'"):
        load_source(config_of(root), "val")


def make_small(root, sizes):
    """Images of the given sizes, in two classes alternately."""
    for i, side in enumerate(sizes):
        folder = root / "train" / CLASSES[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i, side, side).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("sizes", "mode", "held"),
    [
        ((20, 20, 20), "auto", True),
        ((20, 20, 20), "never", False),
        ((20, 24, 20), "auto", False),
        ((20, 20, 20, 20, 24), "auto", False),
        ((64, 64), "auto", True),
        ((65, 65), "auto", False),
        ((65, 65), "always", True),
    ],
)
def test_small_sets_stay_decoded(tmp_path, sizes, mode, held):
    root = make_small(tmp_path, sizes)
    source = load_source(config_of(root, labels=2, in_memory=mode), "train")
    plain = load_source(config_of(root, labels=2, in_memory="never"), "train")
    assert (source.arrays is not None) == held
    np.testing.assert_array_equal(source.labels, plain.labels)
    for i in range(len(sizes)):
        np.testing.assert_array_equal(source[i]["image"], plain[i]["image"])
        if held:
            np.testing.assert_array_equal(source.arrays["image"][i], plain[i]["image"])
            assert source.arrays["label"][i] == plain[i]["label"]


def test_images_are_decoded_in_chunks(tmp_path, monkeypatch):
    root = make_small(tmp_path, (20,) * 11)
    (root / "train/cat/0.png").write_bytes(b"")  # the first image, so that the size is unknown
    plain = load_source(config_of(root, labels=2, in_memory="never"), "train")
    monkeypatch.setattr("m2mkd_jax.data.in_memory.CHUNK", 3)
    source = load_source(config_of(root, labels=2), "train")
    assert set(source.bad) == {0} and source.images.shape == (11, 20, 20, 3)
    for index in range(1, 11):
        np.testing.assert_array_equal(source[index]["image"], plain[index]["image"])
        assert source[index]["label"] == plain[index]["label"] == (index > 5)


def test_large_sets_stay_on_disk(tmp_path, monkeypatch):
    root = make_small(tmp_path, (20,) * 4)
    for limit, held in ((4 * 1200, True), (4 * 1200 - 1, False)):
        monkeypatch.setattr("m2mkd_jax.data.in_memory.MEMORY_BYTES", limit)
        source = load_source(config_of(root, labels=2), "train")
        assert (source.arrays is not None) == held


def test_in_memory_always_needs_images_of_one_size(tmp_path):
    root = make_small(tmp_path, (20, 24))
    with pytest.raises(
        ValueError, match=r"in_memory='always' .*20 x 20 pixels and .*dog/1\.png has 24 x 24;"
    ):
        load_source(config_of(root, labels=2, in_memory="always"), "train")
    with pytest.raises(ValueError, match=r"^in_memory='yes' must be one of"):
        config_of(root, in_memory="yes")


@pytest.mark.parametrize("good", [0, 25, 27, 29])
def test_in_memory_always_needs_one_image_that_can_be_read(tmp_path, good):
    root = make_small(tmp_path, (20,) * 30)
    config = config_of(root, labels=2, in_memory="always")
    plain = load_source(config_of(root, labels=2, in_memory="never"), "train")
    for index in set(range(30)) - {good}:
        (root / plain.files.names[index]).write_bytes(b"")
    source = load_source(config, "train")
    assert set(source.bad) == set(range(30)) - {good}
    (root / plain.files.names[good]).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"none of 30 images can be read: .*cat/0\.png: OSError: th"
    ):
        load_source(config, "train")


def test_set_whose_first_images_are_bad_is_decoded(tmp_path):
    root = make_small(tmp_path, (20,) * 30)
    plain = load_source(config_of(root, labels=2, in_memory="never"), "train")
    for name in plain.files.names[:12]:
        (root / name).write_bytes(b"")
    assert set(load_source(config_of(root, labels=2), "train").bad) == set(range(12))


def test_bad_image_in_a_decoded_set_is_counted(tmp_path):
    root, report = make_small(tmp_path / "set", (20,) * 6), tmp_path / "bad_examples.jsonl"
    (root / "train/cat/2.png").write_bytes(b"")
    source = load_source(config_of(root, labels=2), "train")
    assert source.arrays is None
    with pytest.raises(BadExample, match=r"cat/2\.png: OSError: the file is empty \(0 bytes\)"):
        source[source.labels.tolist().index(0) + 1]
    settings = {"transform": None, "seed": 0, "batch": 6}
    batches = train_batches(source, bad_share=0.2, report_path=report, **settings)
    assert next(batches)["image"].shape == (6, 20, 20, 3) and "cat/2.png" in report.read_text()
    with pytest.raises(ValueError, match=r"1 bad examples of 6.*config\.data\.bad_share"):
        next(train_batches(source, bad_share=0.1, **settings))


def test_an_empty_file_is_a_bad_example(folder, tmp_path):
    (folder / "train/owl/0.jpg").write_bytes(b"")
    for path in (folder, zipped(folder, tmp_path / "set.zip")):
        source = load_source(config_of(path), "train")
        at = source.files.names.index("train/owl/0.jpg")
        with pytest.raises(BadExample, match=r"owl/0\.jpg: OSError: the file is empty"):
            source[at]


def test_wrong_classes_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.labels=7.* 3 classes \(cat, dog"):
        load_source(config_of(folder, labels=7), "train")
    (folder / "train" / "eel").mkdir()
    for path in (folder, zipped(folder, tmp_path / "set.zip")):
        with pytest.raises(ValueError, match="no image for class eel"):
            load_source(config_of(path, labels=4), "train")
    (folder / "new").mkdir()
    with pytest.raises(FileNotFoundError, match="split 'new': no image"):
        load_source(config_of(folder), "new")


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"x"])
def test_bad_images_are_reported_and_stop_the_run_above_bad_share(folder, tmp_path, damage):
    for name in ("cat/2.png", "owl/0.jpg"):
        file = folder / "train" / name
        file.write_bytes(damage(file.read_bytes()))
    config = config_of(folder, workers=2)
    source, report = load_source(config, "train"), tmp_path / "bad_examples.jsonl"
    settings = {"transform": transforms.train_transform(config, AugmentConfig()), "seed": 0}
    batches = train_batches(source, batch=15, bad_share=0.2, report_path=report, **settings)
    assert next(batches)["image"].shape == (15, 36, 36, 3)
    text = report.read_text()
    assert len(text.splitlines()) == 2 and "cat/2.png" in text and "owl/0.jpg" in text
    with pytest.raises(ValueError, match=r"2 bad examples of 15.*config\.data\.bad_share"):
        next(train_batches(source, batch=15, bad_share=0.1, **settings))


def test_evaluation_crops_the_centre(folder):
    config = config_of(folder)
    source = load_source(config, "val")
    batches = list(eval_batches(source, transform=transforms.eval_transform(config), batch=8))
    assert [batch["image"].shape for batch in batches] == [(8, 36, 36, 3)] * 2
    np.testing.assert_array_equal(batches[1]["_mask"], [1] * 7 + [0])
    flat = Image.fromarray(np.full((60, 90, 3), 77, np.uint8))
    assert (np.asarray(transforms.resize_and_centre(flat, 36)) == 77).all()
    # A wide image keeps its middle. Columns rise evenly, so the crop has the image's mean.
    ramp = np.tile(np.arange(0, 202, 2, dtype=np.uint8), (40, 1))
    centre = np.asarray(transforms.resize_and_centre(Image.fromarray(ramp), 35))
    assert centre.shape == (35, 35) and abs(centre.mean() - ramp.mean()) < 0.5


def test_small_images_are_not_resized(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "one").mkdir(parents=True)
        picture(0, 20, 20).save(tmp_path / split / "one" / "0.png")
    fits = config_of(tmp_path, image_size=20, labels=1, test_split="test")
    source = load_source(fits, "test")
    (batch,) = eval_batches(source, transform=transforms.eval_transform(fits), batch=1)
    np.testing.assert_array_equal(batch["image"][0], source[0]["image"])
    wrong = config_of(tmp_path, image_size=24, labels=1)
    with pytest.raises(ValueError, match=r"20 x 20 pixels do not fit config\.data\.image_size=24"):
        list(eval_batches(source, transform=transforms.eval_transform(wrong), batch=1))
    for augment in (AugmentConfig(), AugmentConfig(randaugment=True)):
        with pytest.raises(ValueError, match=r"config\.data\.image_size=24"):
            transform = transforms.train_transform(wrong, augment)
            next(train_batches(source, transform=transform, seed=0, batch=1))


@pytest.mark.parametrize("split", ["test", "train"])
def test_training_split_to_test_on_gives_a_warning(split, caplog):
    config = DataConfig(test_split=split)
    names = load_source(config, "train").label_names
    assert not caplog.text
    assert len(load_test_source(config, names)) == (360 if split == "test" else 1437)
    warned = "config.data.test_split='train' is also the training split: its accuracy is of images"
    assert (warned in caplog.text) == bool(caplog.text) == (split == "train")


@pytest.mark.parametrize("odd", [0, 5, 11])
@pytest.mark.parametrize("mode", ["auto", "always"])
def test_small_image_of_another_size_is_named_while_loading(tmp_path, odd, mode):
    root = make_small(tmp_path, [20 + (number == odd) for number in range(12)])
    with pytest.raises(ValueError, match=rf"/{odd}\.png: 21 x 21 pixels .*image_size=20; "):
        load_source(config_of(root, labels=2, image_size=20, in_memory=mode), "train")
    assert len(load_source(config_of(root, labels=2, in_memory="auto"), "train")) == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_small_image_of_another_size_is_named_when_it_is_read(tmp_path, workers):
    root = make_small(tmp_path, [20 + (number == 5) for number in range(12)])
    config = config_of(root, labels=2, image_size=20, in_memory="never")
    source = Subset(load_source(config, "train"), np.arange(12)[::-1], np.zeros(12, int), CLASSES)
    settings = {"batch": 12, "workers": workers}
    with pytest.raises(ValueError, match=r"dog/5\.png: 21 x 21 pixels"):
        next(eval_batches(source, transform=transforms.eval_transform(config), **settings))
    for augment in (AugmentConfig(), AugmentConfig(randaugment=True)):
        transform = transforms.train_transform(config, augment)
        chosen = transforms.with_pictures(source.source, transform)
        with pytest.raises(ValueError, match=r"dog/5\.png: 21 x 21 pixels"):
            next(train_batches(chosen, transform=transform, seed=0, **settings))


def test_few_images_of_a_set_on_disk_are_measured_before_training(tmp_path):
    root = make_small(tmp_path, [20] * 11 + [21])
    config = config_of(root, labels=2, image_size=20, in_memory="never")
    source = load_source(config, "train")
    with pytest.raises(ValueError, match=r"dog/11\.png: 21 x 21 pixels"):
        transforms.check_sides(source, config)
    (root / "train/dog/11.png").write_bytes(b"")
    transforms.check_sides(source, config)
    transforms.check_sides(source, config_of(root, labels=2))


def test_per_class_keeps_the_first_images_of_each_class():
    whole = load_source(DataConfig(), "train")
    few = load_source(DataConfig(per_class=7, test_per_class=3), "train")
    assert np.bincount(few.labels).tolist() == [7] * 10
    assert few.arrays["image"].shape == (70, 8, 8, 1)
    for label in range(10):
        wanted = whole.arrays["image"][np.flatnonzero(whole.labels == label)[:7]]
        np.testing.assert_array_equal(few.arrays["image"][few.labels == label], wanted)
    assert len(load_source(DataConfig(per_class=7, test_per_class=3), "test")) == 30
    with pytest.raises(ValueError, match=r"per_class=145 asks for more .*8 has 14\d"):
        load_source(DataConfig(per_class=145), "train")
    with pytest.raises(ValueError, match=r"^test_per_class=-1 must be at least 0"):
        DataConfig(test_per_class=-1)


def test_digits_need_the_host_only_for_randaugment():
    assert transforms.train_transform(DataConfig(), AugmentConfig(flip=True, padding=1)) is None
    transform = transforms.train_transform(DataConfig(), AugmentConfig(randaugment=True, padding=1))
    source = load_source(DataConfig(), "train")
    batch = next(train_batches(source, transform=transform, seed=0, batch=64))
    assert batch["image"].shape == (64, 8, 8, 1) and batch["image"].dtype == np.uint8
    plain = next(train_batches(source, transform=None, seed=0, batch=64))
    np.testing.assert_array_equal(batch["label"], plain["label"])
    assert (batch["image"] != plain["image"]).any(axis=(1, 2, 3)).sum() > 32


def test_subset_relabels_and_reorders(folder):
    for source in (load_source(DataConfig(), "train"), load_source(config_of(folder), "train")):
        subset = Subset(source, np.array([5, 2]), np.array([1, 0], np.int32), ("a", "b"))
        assert len(subset) == 2 and subset[0]["label"] == 1
        np.testing.assert_array_equal(subset[1]["image"], source[2]["image"])
        if source.arrays is not None:
            np.testing.assert_array_equal(subset.arrays["label"], [1, 0])
            np.testing.assert_array_equal(subset.arrays["image"][0], source[5]["image"])
