"""Which classes a set has, and which label each image gets: names decide, whatever else is in the
folder."""

import dataclasses
import logging
import os
import zipfile

import jax
import numpy as np
import pytest
from meshes import one_device
from PIL import Image
from tiny import feed_of, fill, tiny_config

from common_jax import checkpoint, loop
from common_jax.config import unfreeze
from common_jax.inputs import BadExample
from common_jax.mesh import match_rules, with_shardings
from common_jax.optim import OptimConfig
from common_jax.workdir import write_json
from m2mkd_jax.config import InitConfig, SourcesConfig
from m2mkd_jax.data.sources import DataConfig, load_source
from m2mkd_jax.phases.few_shot import load_splits
from m2mkd_jax.phases.networks import meta_network, whole_student
from m2mkd_jax.phases.pipeline import run_phase

RGB = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def draw(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path)


def make(root, **splits):
    """A folder with `splits`, each {class: number of images}; an image's pixels encode its
    class."""
    for split, classes in splits.items():
        for name, count in classes.items():
            for number in range(count):
                draw(root / split / name / f"{number}.png", value=ord(name[0]))
    return root


def data_of(path, labels, **settings):
    return DataConfig("folder", str(path), 8, labels=labels, **RGB | settings)


def config_of(path, labels, **settings):
    optim = OptimConfig(steps=1, batch=4)
    return dataclasses.replace(
        tiny_config("end_to_end", optim=optim), data=data_of(path, labels, **settings)
    )


def labels_by_class(feed):
    """First letter of the class encoded in the pixels -> labels."""
    found = {}
    for batch in feed.evaluation():
        real = batch["_mask"] > 0
        for image, label in zip(batch["image"][real], batch["label"][real], strict=True):
            found.setdefault(chr(image[0, 0, 0]), set()).add(int(label))
    return found


def test_unknown_test_class_is_refused_before_writing(tmp_path):
    three = {"cat": 2, "dog": 2, "fox": 2}
    root = make(tmp_path / "set", train=three, test={"ant": 2, "cat": 2, "dog": 2})
    workdir = tmp_path / "run"
    message = r"split 'test' has 3 classes, but .* lacks 1 of them: ant; .* cat, dog, fox\. Rename"
    with pytest.raises(ValueError, match=message):
        feed_of(config_of(root, 3), workdir)
    with pytest.raises(ValueError, match=message):
        load_splits(config_of(root, 3))
    assert not workdir.exists()


def test_fewer_test_classes_keep_training_labels(tmp_path):
    root = make(tmp_path / "set", train={"ant": 2, "cat": 2, "dog": 2}, test={"cat": 3, "dog": 1})
    feed = feed_of(config_of(root, 3), tmp_path)
    assert feed.label_names == ("ant", "cat", "dog")
    assert labels_by_class(feed) == {"c": {1}, "d": {2}}
    _, test = load_splits(config_of(root, 3))
    assert test.labels.tolist() == [1, 1, 1, 2]
    assert tuple(test.label_names) == ("ant", "cat", "dog")


@pytest.mark.parametrize("held", ["never", "always"])
def test_identical_classes_keep_their_labels(tmp_path, held):
    same = {"ant": 2, "cat": 2}
    root = make(tmp_path / "set", train=same, test=same)
    feed = feed_of(config_of(root, 2, in_memory=held), tmp_path)
    assert labels_by_class(feed) == {"a": {0}, "c": {1}}


def test_class_numbers_are_refused_against_class_names(tmp_path):
    wnids = {f"n{i:02}": 1 for i in range(11)}
    root = make(tmp_path / "set", train=wnids, test={str(i): 1 for i in range(11)})
    with pytest.raises(ValueError, match=r"class numbers without names, as in ImageNetV2.*Rename"):
        feed_of(config_of(root, 11), tmp_path)


def test_class_numbers_are_matched_as_names(tmp_path):
    """Sorted as text, 10 comes before 2; a test set without 10 must not shift the other labels."""
    root = make(tmp_path / "set", train={"1": 1, "10": 1, "2": 1}, test={"1": 1, "2": 1})
    _, test = load_splits(config_of(root, 3))
    assert test.labels.tolist() == [0, 2]


def test_images_without_class_folders_error_suggests_a_fix(tmp_path):
    root = make(tmp_path / "set", train={"ant": 1, "bee": 1})
    for number in range(3):
        draw(root / f"test/ILSVRC2012_val_{number:08}.JPEG")
    packed = tmp_path / "set.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in root.rglob("*"):
            archive.write(file, file.relative_to(root))
    for path in (root, packed):
        with pytest.raises(ValueError, match=r"split 'test': all 3 images lie in .*valprep\.sh"):
            feed_of(config_of(path, 2), tmp_path)


def test_images_outside_class_folders_are_skipped_with_a_warning(tmp_path, caplog):
    root = make(tmp_path / "set", train={"ant": 1})
    draw(root / "train/loose.png")
    assert len(load_source(data_of(root, 1), "train")) == 1
    assert "1 images that are in no class folder" in caplog.text


def test_hidden_files_and_folders_are_ignored(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = make(tmp_path / "set", train={"ant": 2, "bee": 1})
    for name in ("ant/.DS_Store", "ant/._0.png", ".ipynb_checkpoints/0.png", "bee/.x/0.png"):
        draw(root / "train" / "x.png")
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train/x.png").rename(root / "train" / name)
    packed = tmp_path / "set.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in root.rglob("*"):
            archive.write(file, file.relative_to(root))
        archive.writestr("__MACOSX/train/ant/._0.png", b"x")
    for path in (root, packed):
        source = load_source(data_of(path, 2), "train")
        assert source.label_names == ("ant", "bee")
        assert source.labels.tolist() == [0, 0, 1]
    assert "left out hidden folders: .ipynb_checkpoints" in caplog.text


def test_symlink_to_parent_is_ignored(tmp_path, caplog):
    root = make(tmp_path / "set", train={"ant": 1, "bee": 2})
    (root / "train/ant/all").symlink_to("..", target_is_directory=True)
    (root / "train/ant/root").symlink_to(root.parent, target_is_directory=True)
    (root / "train/ant/again").symlink_to(".", target_is_directory=True)
    source = load_source(data_of(root, 2), "train")
    assert source.labels.tolist() == [0, 1, 1]
    assert "3 links to folders that were already read" in caplog.text


def test_classes_that_share_a_folder_are_refused(tmp_path):
    root = make(tmp_path / "set", train={"ant": 1, "bee": 2})
    (root / "train/cat").symlink_to("bee", target_is_directory=True)
    with pytest.raises(ValueError, match=r"classes 'bee' and 'cat' share the folder '.*/bee'"):
        load_source(data_of(root, 3), "train")
    (root / "train/cat").unlink()
    (root / "train/ant/more").symlink_to("../bee", target_is_directory=True)
    with pytest.raises(ValueError, match=r"classes 'bee' and 'ant' share the folder"):
        load_source(data_of(root, 2), "train")


def test_links_to_missing_folders_give_a_warning(tmp_path, caplog):
    root = make(tmp_path / "set", train={"ant": 1, "bee": 1})
    assert load_source(data_of(root, 2), "train").label_names == ("ant", "bee")
    assert not caplog.text
    for link in ("cat", "bee/more", "bee/.hidden", ".hidden"):
        (root / "train" / link).symlink_to("nowhere", target_is_directory=True)
    (root / "train/ant/same").symlink_to("same")
    assert load_source(data_of(root, 2), "train").label_names == ("ant", "bee")
    links = ", ".join(str(root / "train" / link) for link in ("ant/same", "bee/more", "cat"))
    assert (
        f"left out 3 links whose targets are missing, and which may be folders of images: {links}"
        in (caplog.text)
    )


def test_folder_symlinked_twice_within_its_class_counts_once(tmp_path):
    root = make(tmp_path / "set", train={"ant": 1})
    draw(tmp_path / "elsewhere/a.png")
    for name in ("y", "x"):
        (root / "train/ant" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    draw(root / "train/ant/z/b.png")
    (root / "train/ant/a").symlink_to("z", target_is_directory=True)
    source = load_source(data_of(root, 1, in_memory="never"), "train")
    # A real folder takes precedence over links to it, and of two links, the first by name.
    assert source.files.names == ("train/ant/0.png", "train/ant/x/a.png", "train/ant/z/b.png")


def test_a_split_may_end_in_a_slash(tmp_path):
    root = make(tmp_path / "set", train={"ant": 1, "bee": 1})
    assert load_source(data_of(root, 2), "train/").labels.tolist() == [0, 1]
    with pytest.raises(FileNotFoundError, match="no split '/'"):
        load_source(data_of(root, 2), "/")


def test_file_symlinks_are_images_and_dangling_ones_are_bad_examples(tmp_path):
    root = make(tmp_path / "set", train={"ant": 1})
    draw(tmp_path / "other.png", 7)
    (root / "train/ant/1.png").symlink_to(tmp_path / "other.png")
    (root / "train/ant/2.png").symlink_to(tmp_path / "nowhere.png")
    (root / "train/ant/3.png").symlink_to("3.png")
    os.mkfifo(root / "train/ant/4.png")
    source = load_source(data_of(root, 1), "train")
    assert len(source) == 5
    np.testing.assert_array_equal(source[1]["image"], 7)
    for index, reason in ((2, "FileNotFoundError"), (3, "symbolic"), (4, "not a regular file")):
        with pytest.raises(BadExample, match=rf"{index}\.png: .*{reason}"):
            source[index]


def test_non_utf8_names(tmp_path):
    root = make(tmp_path / "set", train={"ant": 1})
    odd = os.fsdecode(b"x\xff.png")
    (root / "train/ant" / odd).write_bytes(b"no image")
    source = load_source(data_of(root, 1), "train")
    with pytest.raises(BadExample, match=r"x\\udcff\.png: Unident") as error:
        source[1]
    str(error.value).encode()  # can be printed and written to a file
    (root / "train" / os.fsdecode(b"b\xe4r")).mkdir()
    with pytest.raises(ValueError, match=r"not UTF-8: b\\udce4r; rename"):
        load_source(data_of(root, 1), "train")


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    root, scandir = make(tmp_path / "set", train={"ant": 1, "bee": 1}), os.scandir

    def locked(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(PermissionError, match="train/bee"):
        load_source(data_of(root, 2), "train")


@pytest.mark.parametrize("by", ["students", "upcycle"])
def test_loaded_head_of_other_classes_gives_a_warning(by, tmp_path, monkeypatch, caplog):
    def train(task, *arguments, **settings):
        params = jax.eval_shape(task.init, jax.random.key(0))
        task.warm_start(with_shardings(params, match_rules(task.rules, params, one_device())))
        return {}

    monkeypatch.setattr(loop, "train", train)
    config, source = tiny_config("end_to_end"), tmp_path / "source"
    network = whole_student(config) if by == "students" else meta_network(config)
    role = "student" if by == "students" else "meta"
    checkpoint.write_params(source, {role: fill(network.init)}, unfreeze(config).to_dict())
    given = {"students": (str(source),)} if by == "students" else {}
    init = InitConfig(upcycle=str(source) if by == "upcycle" else "")

    def warned(names, **sources):
        write_json(source / "classes.json", {"names": names})
        caplog.clear()
        told = dataclasses.replace(config, init=init, sources=SourcesConfig(**given, **sources))
        run_phase(told, tmp_path / "run", one_device())
        return [line for line in caplog.messages if "was trained with class" in line]

    (said,) = warned([*"0123546789"])
    assert "named '5' (of 0, 1, 2, 3, 5 and 5 more), and config.data names it '4'" in said
    # What it advises gives a head from scratch.
    advised = said.partition("--config.sources.fresh=")[2].strip("'")
    assert advised == r"student/stage_\d+/head/.*"
    assert not warned([*"0123546789"], fresh=advised) and "matches no" not in caplog.text
    assert not warned([*"0123456789"])
