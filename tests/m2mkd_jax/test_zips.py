"""Zips whose central directory disagrees with their content, byte by byte."""

import dataclasses
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from common_jax.inputs import BadExample, train_batches
from m2mkd_jax.data.sources import DataConfig, load_source

NAMES = ("train/ant/0.png", "train/ant/1.png", "train/bee/0.png", "train/bee/1.png")
SIZE, PACKED_SIZE, FLAGS, OFFSET, NAME = 24, 20, 8, 42, 46  # offsets in a central directory's entry


def png(value):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(content, "PNG")
    return content.getvalue()


def make(path, names=NAMES):
    with zipfile.ZipFile(path, "w") as archive:
        for value, name in enumerate(names):
            archive.writestr(name, png(value))
    return path


def change(path, number, place, content):
    """Overwrites bytes in the `number`-th entry of the central directory."""
    whole, at = bytearray(path.read_bytes()), -1
    for _ in range(number + 1):
        at = whole.index(b"PK\x01\x02", at + 1)
    whole[at + place : at + place + len(content)] = content
    path.write_bytes(whole)
    return path


CONFIG = DataConfig("folder", "", 8, 3, 2, (0.5,) * 3, (0.5,) * 3, in_memory="never")


def load(path, labels=2, **settings):
    config = dataclasses.replace(CONFIG, path=str(path), labels=labels, **settings)
    return load_source(config, "train")


TIMES = struct.pack("<HHBll", 0x5455, 9, 3, 1, 2)  # extra fields as written by Info-ZIP
OWNER = struct.pack("<HHBBlBl", 0x7875, 11, 1, 4, 0, 4, 0)
LONG = struct.pack("<HH", 0x7777, 300) + bytes(300)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("local", "listed"),
    [
        (TIMES + OWNER, struct.pack("<HHBl", 0x5455, 5, 3, 1) + OWNER),  # as by `zip -0 -r`
        (LONG + TIMES, b""),
        (b"", TIMES + LONG),
    ],
    ids=["as_by_zip", "long", "listed_alone"],
)
def test_extra_fields_and_folders_do_not_shift_images(tmp_path, local, listed, copied):
    """The extra field before a member's content differs in length from the one in the directory."""
    path = tmp_path / "set.zip"
    names = ("train/", "train/ant/", *NAMES[:2], "train/bee/", *NAMES[2:], "val/", "val/ant/0.png")
    with zipfile.ZipFile(path, "w") as archive:
        for value, name in enumerate(names):
            member = zipfile.ZipInfo(name)
            member.extra = local
            archive.writestr(member, b"" if name.endswith("/") else png(value))
            member.extra = listed
    source = load(path)
    source = pickle.loads(pickle.dumps(source)) if copied else source
    assert source.files.names == NAMES and source.labels.tolist() == [0, 0, 1, 1]
    assert [int(source[i]["image"][0, 0, 0]) for i in range(4)] == [2, 3, 5, 6]


def test_split_matches_a_whole_name_or_path(tmp_path):
    names = ("train/ant/0.png", "training/bee/0.png", "train.bak/cat/0.png", "a/train/dog/0.png")
    path = make(tmp_path / "set.zip", names)
    assert load(path, labels=1).label_names == ("ant",)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "set")
    config = dataclasses.replace(CONFIG, labels=1)
    for root in (path, tmp_path / "set"):
        source = load_source(dataclasses.replace(config, path=str(root)), "a/train")
        assert source.label_names == ("dog",) and source.files.names == ("a/train/dog/0.png",)
        np.testing.assert_array_equal(source[0]["image"], 3)


def test_macosx_folder_is_not_a_class(tmp_path):
    """In a zip of bare CLASS/ folders, it lies next to the classes."""
    make(tmp_path / "train.zip", ("ant/0.png", "__MACOSX/0.png", "__MACOSX/ant/0.png"))
    source = load(tmp_path, labels=1)
    assert source.label_names == ("ant",) and source.files.names == ("ant/0.png",)


def test_classes_and_images_are_sorted_regardless_of_zip_order(tmp_path):
    names = tuple(f"train/{name}/{number}.png" for name in "cab" for number in (10, 9, 1))
    source = load(make(tmp_path / "set.zip", names), labels=3)
    assert source.label_names == ("a", "b", "c")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [name[-6:] for name in source.files.names[:3]] == ["/1.png", "10.png", "/9.png"]
    shown = [int(source[i]["image"][0, 0, 0]) for i in range(9)]
    assert shown == [5, 3, 4, 8, 6, 7, 2, 0, 1]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("place", "content"),
    [
        (SIZE, struct.pack("<I", 0xFFFFFFF0)),
        (SIZE, struct.pack("<I", 3)),
        (PACKED_SIZE, struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)),
        (PACKED_SIZE, struct.pack("<II", 60, 60)),
        (OFFSET, struct.pack("<I", 0xFFFFFFF0)),
        (OFFSET, struct.pack("<I", 1)),
        (OFFSET, struct.pack("<I", 0)),  # where another member is
        (16, b"\0\0\0\0"),  # the checksum
        (NAME, b"train/ant/7"),
    ],
)
def test_member_that_is_not_as_declared_is_one_bad_image(tmp_path, place, content, copied):
    source = load(change(make(tmp_path / "set.zip"), 1, place, content))
    source = pickle.loads(pickle.dumps(source)) if copied else source
    assert source.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(BadExample, match=r"set\.zip/train/ant/[17]\.png: OSError: "):
        source[1]
    for index in (0, 2, 3):
        np.testing.assert_array_equal(source[index]["image"], index)


@pytest.mark.parametrize("content", [b"trbin/ant/1.png", b"train/ant/1.pnx", b".rain/ant/1.png"])
def test_member_with_a_damaged_name_is_refused(tmp_path, content):
    path = change(make(tmp_path / "set.zip"), 1, NAME, content)
    with pytest.raises(ValueError, match=r"set\.zip': .*ant/1\.pn. has another name"):
        load(path)


def test_an_entry_that_swallows_the_next_is_refused(tmp_path):
    whole = make(tmp_path / "set.zip").read_bytes()
    first = whole.index(b"PK\x01\x02")
    entry = whole.index(b"PK\x01\x02", first + 1) - first  # all have the same length
    path = change(tmp_path / "set.zip", 2, 32, struct.pack("<H", entry))  # turned into a comment
    with pytest.raises(ValueError, match=r"set\.zip.*3 of its 4 members are listed"):
        load(path)


def test_a_zip_with_a_comment_is_read(tmp_path):
    with zipfile.ZipFile(make(tmp_path / "set.zip"), "a") as archive:
        archive.comment = b"four images"
    assert len(load(tmp_path / "set.zip")) == 4


def test_a_name_in_another_encoding_is_a_bad_image(tmp_path):
    path = make(tmp_path / "set.zip", ("train/k\u00e4fer/0.png",))
    with pytest.raises(BadExample, match="something else"):
        load(change(path, 0, FLAGS, b"\0\0"), labels=1)[0]


def test_absurd_zip64_size_is_one_bad_image(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for value, name in enumerate(NAMES):
            archive.writestr(name, png(value))
        archive.infolist()[2].file_size = 2**63 + 5
        archive.infolist()[2].compress_size = 2**63 + 5
    source = load(path)
    with pytest.raises(
        BadExample, match=r"bee/0\.png: .* 9223372036854775813 bytes, which it does not"
    ):
        source[2]
    report = tmp_path / "bad_examples.jsonl"
    settings = {"transform": None, "seed": 0, "batch": 4, "report_path": report}
    assert next(train_batches(source, bad_share=0.3, **settings))["image"].shape == (4, 8, 8, 3)
    assert "bee/0.png" in report.read_text()


def test_zip64_is_read(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for value, name in enumerate(NAMES):
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(png(value))
    source = load(path)
    assert [int(source[i]["image"][0, 0, 0]) for i in range(4)] == [0, 1, 2, 3]


def test_non_ascii_names_are_read(tmp_path):
    source = load(make(tmp_path / "set.zip", ("train/käfer/ö.png", "train/犬/0.png")))
    assert source.label_names == ("käfer", "犬")
    assert [int(source[i]["image"][0, 0, 0]) for i in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/ant/0.png", "train/ant/0.png"), r"train/ant/0\.png occur more than once"),
        (("train/ant/0.png", "../train/bee/0.png"), r"\.\./train/bee/0\.png have names that lead"),
        (("train/ant/0.png", "/train/bee/0.png"), r"/train/bee/0\.png have names that lead out"),
        (
            ("train/ant/0.png", "train/ant/../x.png"),
            r"train/ant/\.\./x\.png have names that lead out",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_and_escaping_names_are_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=rf"config\.data\.path='.*set\.zip': {message}"):
        load(make(tmp_path / "set.zip", names))


def test_encrypted_members_are_refused(tmp_path):
    path = change(make(tmp_path / "set.zip"), 1, FLAGS, b"\1")
    with pytest.raises(
        ValueError, match=r"set\.zip.*train/ant/1\.png are encrypted; make the zip w"
    ):
        load(path)


def test_nested_folders_and_members_without_a_class(tmp_path):
    names = ("train/ant/x/y/0.png", "train/bee/0.png", "train//0.png", "notes.png")
    source = load(make(tmp_path / "set.zip", names))
    assert source.label_names == ("ant", "bee") and len(source) == 2


def test_damaged_bytes_are_refused_or_give_bad_images(tmp_path):
    whole, rng = make(tmp_path / "whole.zip").read_bytes(), np.random.default_rng(0)
    path, plain = tmp_path / "set.zip", load(tmp_path / "whole.zip")
    for _ in range(300):
        content = bytearray(whole)
        # Central directory and end record are the last 300 bytes or so.
        start = 0 if rng.random() < 0.3 else len(content) - 350
        for place in rng.integers(start, len(content), rng.integers(1, 4)):
            content[place] = rng.integers(256)
        path.write_bytes(content[: len(content) - (rng.random() < 0.1) * rng.integers(1, 200)])
        try:
            source = load(path)
        except (OSError, ValueError) as error:
            assert "set.zip" in str(error) and len(str(error)) < 2000
            continue
        known = {plain.files.names[i]: plain[i]["image"] for i in range(4)}
        for index in range(len(source)):
            try:
                image = source[index]["image"]
            except BadExample as bad:
                assert str(path) in str(bad) and str(bad).isprintable() and len(str(bad)) < 2000
            else:
                np.testing.assert_array_equal(image, known[source.files.names[index]])


def test_unreadable_zip_is_named(tmp_path, monkeypatch):
    def locked(self, *_, **__):
        raise PermissionError(13, "Permission denied", os.fspath(tmp_path / "set.zip"))

    make(tmp_path / "set.zip")
    monkeypatch.setattr(zipfile.ZipFile, "__init__", locked)
    with pytest.raises(PermissionError, match=r"set\.zip"):
        load(tmp_path / "set.zip")
