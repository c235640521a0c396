"""Image names: which files are images, how lists of them are displayed, and lists of classes."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from m2mkd_jax.data.files import folders
from m2mkd_jax.data.files.folders import label_rows, read_names, require_filled
from m2mkd_jax.data.files.listing import DEEPEST, find_in_directory, is_image, listed, printable
from m2mkd_jax.data.files.zips import find_in_zip


def test_listed_shows_ten_names_and_counts_the_rest():
    names = [f"n{number:02}" for number in range(12)]
    assert listed(reversed(names[:10])) == ", ".join(names[:10])
    assert listed(reversed(names)) == ", ".join(names[:10]) + " and 2 more"
    assert listed(["b", "a"]) == "a, b" and listed([]) == ""


def test_listed_shortens_long_names_and_shows_fewer():
    (long,) = (listed(["a" * 500 + "b" * 500]),)
    assert long == "a" * 175 + "..." + "b" * 175
    assert listed(letter * 300 for letter in "cab") == f"{'a' * 300}, {'b' * 300} and 1 more"
    assert printable("a\nb\x1b\udcff") == "a\\nb\\x1b\\udcff"


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("a.png", True),
        ("a/b.JPEG", True),
        ("a.webp", True),
        ("a.png.txt", False),
        ("png", False),
        ("._a.png", False),
        (".cache/a.png", False),
        ("a/.b/c.png", False),
    ],
)
def test_is_image_goes_by_file_name(name, is_one):
    assert is_image(name) == is_one


def test_too_deeply_nested_folders_are_refused(tmp_path):
    """Images up to DEEPEST folders below their class are found; beyond that, the path is
    refused."""
    folder = tmp_path / "train/ant" / "/".join("x" * DEEPEST)
    folder.mkdir(parents=True)
    Image.new("L", (4, 4)).save(folder / "0.png")
    files, classes, depth = find_in_directory(tmp_path, "train")
    assert len(files.names) == 1 and classes == ["ant"] and depth == 1
    (folder / "x").mkdir()
    with pytest.raises(ValueError, match=rf"lies more than {DEEPEST} folders deep"):
        find_in_directory(tmp_path, "train")


@pytest.mark.parametrize("zipped", [False, True])
def test_unsupported_image_files_are_counted(tmp_path, zipped, caplog):
    folder = tmp_path / "train/ant"
    folder.mkdir(parents=True)
    Image.new("L", (4, 4)).save(folder / "0.png")
    for name in ("1.avif", "2.AVIF", "3.jfif", "boxes.txt", ".4.avif", "README"):
        (folder / name).touch()
    if zipped:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for path in sorted(tmp_path.rglob("train/**/*")):
                archive.write(path, path.relative_to(tmp_path))
        files, _, _ = find_in_zip(tmp_path / "set.zip", "train")
    else:
        files, _, _ = find_in_directory(tmp_path, "train")
    assert len(files.names) == 1
    assert (
        "left out 3 files that are not named like images: .avif (2), .jfif (1); those are .bmp"
        in (caplog.text)
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_class_lists_with_bom_and_any_line_ending(tmp_path, end):
    path = tmp_path / "names.txt"
    path.write_bytes(f"\ufeffn02{end}{end} n01 {end}n03".encode())
    assert read_names(path) == ["n02", "n01", "n03"]


def test_labels_are_indices_into_the_classes():
    rows = [("a.png", "x"), ("b.png", "z"), ("c.png", "y"), ("d.png", "z")]
    labels = label_rows(rows, ["z", "x", "y"], at="list")
    assert labels.tolist() == [1, 0, 2, 0] and labels.dtype == np.int32
    with pytest.raises(ValueError, match=r"labels \[3\] are not from 0 to 2"):
        require_filled(np.array([0, 1, 2, 3]), "xyz", at="list", way_out="")
    with pytest.raises(ValueError, match="no image for class z; fill it"):
        require_filled(np.array([0, 1]), "xyz", at="list", way_out="fill it")


@pytest.mark.parametrize(
    ("names", "label"), [(("2", "10"), 0), (("02", "10"), None), (("2", "9"), None)]
)
def test_numeric_classes_sorted_as_text_give_a_warning(tmp_path, names, label, caplog):
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "train" / name / "0.png")
    assert folders.find_folder(str(tmp_path), "train").label_names == tuple(sorted(names))
    assert (f"'10' has label {label};" in caplog.text) == (label is not None)
    assert bool(caplog.text) == (label is not None)
