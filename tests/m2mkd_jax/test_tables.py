"""Images outside class folders: tables, flat folders with a list; and sets split by fraction."""

import logging
import re

import numpy as np
import pytest
from PIL import Image

from m2mkd_jax.data.own import discover
from m2mkd_jax.data.sources import DataConfig, load_source, load_test_source, open_source

CLASSES = ("ant", "bee", "cat")
HEADER = "path,label,split"


def draw(path, value, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), value if mode == "L" else (value, 0, 0)).save(path)


def data_of(path, source="table", **settings):
    colours = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return DataConfig(source, str(path), labels=3, **colours | settings)


def values(source):
    """The red value of every image, which encodes its class, by label name."""
    found = {}
    for index in range(len(source)):
        example = source[index]
        name = source.label_names[int(example["label"])]
        found.setdefault(name, []).append(int(example["image"][0, 0, 0]))
    return found


def flat(root, each=4):
    """`each` images per class, all in one folder; returns their (path, class)."""
    rows = []
    for number, name in enumerate(CLASSES):
        for copy in range(each):
            file = f"pictures/{name[0]}{copy}.png"
            draw(root / file, 10 * number + copy)
            rows.append((file, name))
    return rows


def write_csv(path, rows, header="path,label"):
    path.write_text("".join(f"{line}\n" for line in (header, *map(",".join, rows))))


def test_one_table_per_split(tmp_path):
    rows = flat(tmp_path)
    write_csv(tmp_path / "train.csv", [row for row in rows if "0" not in row[0]])
    write_csv(tmp_path / "test.csv", [row for row in rows if row[0].endswith("c0.png")])
    config = data_of(tmp_path)
    train = load_source(config, "train")
    assert values(train) == {"ant": [1, 2, 3], "bee": [11, 12, 13], "cat": [21, 22, 23]}
    test = load_test_source(config, train.label_names)
    assert values(test) == {"cat": [20]} and test.label_names == CLASSES
    with pytest.raises(FileNotFoundError, match=r"no table for split 'tests' \(did .*test, train;"):
        load_source(data_of(tmp_path, train_split="tests"), "tests")


def test_table_with_a_split_column(tmp_path):
    rows = [
        (str(tmp_path / file), label, "test" if "3" in file else "fit")
        for file, label in flat(tmp_path)
    ]
    write_csv(tmp_path / "lists.csv", rows, HEADER)
    config = data_of(tmp_path / "lists.csv", train_split="fit")
    assert len(load_source(config, "fit")) == 9
    assert values(load_source(config, "test")) == {"ant": [3], "bee": [13], "cat": [23]}
    with pytest.raises(
        ValueError, match=r"no images of split 'train', only of: fit, test; correct"
    ):
        load_source(data_of(tmp_path / "lists.csv"), "train")


@pytest.mark.parametrize("name", ["./a0.png", "x/../a0.png", "{root}//a0.png"])
def test_an_image_has_one_label_whatever_its_split_and_spelling(tmp_path, name, caplog):
    draw(tmp_path / "a0.png", 0)
    again = name.format(root=tmp_path)
    config = data_of(tmp_path / "t.csv")
    for label, split in (("ant", "train"), ("bee", "test")):
        write_csv(tmp_path / "t.csv", [("a0.png", "ant", "train"), (again, label, split)], HEADER)
        with pytest.raises(
            ValueError, match=r"more than once: .*/a0\.png;|lines 2 and 3 give the "
        ):
            open_source(config, "train")
    assert "other splits" not in caplog.text
    write_csv(tmp_path / "t.csv", [("a0.png", "ant", "train"), (again, "ant", "test")], HEADER)
    assert len(open_source(config, "train")) == 1
    assert "1 images of split 'train' are in other splits too: " in caplog.text


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ((("a.png", ""),), "path,label", r"t\.csv, line 2, column 'label' is empty; fill it"),
        (
            (("a.png", "ant"),) * 2,
            "path,label",
            r"t\.csv: these names occur more than once: .*/a\.png;",
        ),
        (
            (("a.png", "ant"),),
            "file,label",
            r"t\.csv has no column 'path', which should hold the i",
        ),
        ((("a.png", "ant"),), "path,label", r"no column 'split', .*set config\.data\.test_share"),
    ],
)
def test_table_errors_are_named(tmp_path, rows, header, message):
    write_csv(tmp_path / "t.csv", rows, header)
    share = 0.0 if "test_share" in message else 0.5
    with pytest.raises(ValueError, match=message):
        load_source(data_of(tmp_path / "t.csv", test_share=share), "train")


def folders(root, sizes):
    for number, (name, size) in enumerate(sizes.items()):
        for copy in range(size):
            draw(root / name / f"{copy}.png", 50 * number + copy)


def test_fraction_of_every_class_is_held_out_for_testing(tmp_path, caplog):
    folders(tmp_path, {"ant": 20, "bee": 5, "cat": 2})
    config = data_of(tmp_path, "folder", test_share=0.2)
    with caplog.at_level(logging.INFO):
        train, test = values(load_source(config, "train")), values(load_source(config, "test"))
    assert {name: len(test[name]) for name in CLASSES} == {"ant": 4, "bee": 1, "cat": 1}
    whole = {"ant": range(20), "bee": range(50, 55), "cat": range(100, 102)}
    assert {name: sorted(train[name] + test[name]) for name in CLASSES} == {
        name: list(numbers) for name, numbers in whole.items()
    }
    message = "21 of 27 images to train on (config.data.test_share=0.2 of each class, split_seed=0)"
    assert message in caplog.text
    assert values(load_source(config, "test")) == test
    other = data_of(tmp_path, "folder", test_share=0.2, split_seed=1)
    assert values(load_source(other, "test")) != test
    draw(tmp_path / "dog/0.png", 0)
    with pytest.raises(ValueError, match=r"test_share=0\.2 needs two images of each .* of dog;"):
        load_source(config, "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "digits"}, r"^test_share=0\.2 is for the sources folder, table; 'digits' is"),
        ({"train_split": "test"}, r"^test_share=0\.2 needs two names: .* both 'test'"),
    ],
)
def test_holding_out_a_fraction_needs_an_unsplit_set(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"source": "folder", "path": "x", "test_share": 0.2} | settings)


LISTS = {
    "file, tab, class": "a0.png\tant\nb0.png\tbee\nc0.png\tcat\n",
    "stem, space, class": "c0 cat\nb0 bee\na0 ant\n",
    "path, comma, class": "val/b0.png, bee\nval/a0.png, ant\nval/c0.png, cat\n",
    "classes alone": "ant\nbee\ncat\n",
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_flat_split_with_a_class_list(tmp_path, text):
    folders(tmp_path / "train", dict.fromkeys(CLASSES, 1))
    for number, name in enumerate(CLASSES):
        draw(tmp_path / f"val/{name[0]}0.png", number)
    (tmp_path / "val.txt").write_text(text)
    config = data_of(tmp_path, "folder", test_split="val")
    train = load_source(config, "train")
    test = load_test_source(config, train.label_names)
    assert values(test) == {"ant": [0], "bee": [1], "cat": [2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant\nbee\n", r"val\.txt has 2 classes, one per line, but .*val has 1 images; write FILE"),
        (
            "ant a0.png\n",
            r"val\.txt, line 1 must have a file of .*val and its class, .* by ' '; it is 'ant a0",
        ),
        ("x ant\ny bee\n", r"has 2 classes, .*: no line begins with a file there \(a0\.png\)"),
        (
            "x.png ant\n",
            r"val\.txt, line 1 must have a file of .*val and its class, separated by ' '",
        ),
        (
            "a0.png ant\na0.png bee\n",
            r"val\.txt: these names occur more than once: .*/val/a0\.png;",
        ),
    ],
)
def test_mismatched_list_is_named(tmp_path, text, message):
    draw(tmp_path / "val/a0.png", 0)
    (tmp_path / "val.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_source(data_of(tmp_path, "folder"), "val")


@pytest.mark.parametrize("prefix", ["", "img_"])
def test_classes_alone_need_one_order_of_the_images(tmp_path, prefix):
    for number in (1, 2, 10):
        draw(tmp_path / f"val/{prefix}{number}.png", number)
    (tmp_path / "val.txt").write_text("ant\nbee\ncat\n")
    config = data_of(tmp_path, "folder")
    with pytest.raises(
        ValueError, match=rf"val\.txt .* {prefix}1\.png, {prefix}10\.png, .*FILE and"
    ):
        load_source(config, "val")
    for number in (1, 2):
        (tmp_path / f"val/{prefix}{number}.png").rename(tmp_path / f"val/{prefix}0{number}.png")
    assert values(load_source(config, "val")) == {"ant": [1], "bee": [2], "cat": [10]}


@pytest.mark.parametrize("text", ["red fox\npolar bear\n", "fox, red\nbear, polar\n"])
def test_all_classes_alone_may_have_several_words(tmp_path, text):
    for number, name in enumerate(("a0", "b0")):
        draw(tmp_path / f"val/{name}.png", number)
    (tmp_path / "val.txt").write_text(text)
    fox, bear = text.splitlines()
    assert values(open_source(data_of(tmp_path, "folder"), "val")) == {fox: [0], bear: [1]}


@pytest.mark.parametrize("text", ["cat\ngreat dane\n", "great dane\ncat\n"])
def test_classes_alone_may_have_several_words(tmp_path, text):
    for name in ("a0", "b0"):
        draw(tmp_path / f"val/{name}.png", 0)
    (tmp_path / "val.txt").write_text(text)
    source = open_source(data_of(tmp_path, "folder"), "val")
    assert source.label_names == ("cat", "great dane") and sorted(source.labels) == [0, 1]


def test_classes_with_files_may_have_commas(tmp_path):
    draw(tmp_path / "val/a0.png", 0)
    (tmp_path / "val.txt").write_text("a0 tench, Tinca tinca\n")
    source = open_source(data_of(tmp_path, "folder"), "val")
    assert source.label_names == ("tench, Tinca tinca",)


def test_image_missing_from_the_list_is_named(tmp_path):
    for name in ("a0", "b0"):
        draw(tmp_path / f"val/{name}.png", 0)
    (tmp_path / "val.txt").write_text("a0 ant\n")
    with pytest.raises(ValueError, match=r"no class for 1 images of .*val: b0\.png; add or remove"):
        load_source(data_of(tmp_path, "folder"), "val")


def test_settings_are_detected(tmp_path):
    given = vars(DataConfig())
    folders(tmp_path / "whole", dict.fromkeys(CLASSES, 2))
    folders(tmp_path / "split/train", dict.fromkeys(CLASSES, 2))
    folders(tmp_path / "split/valid", dict.fromkeys(CLASSES, 1))
    (tmp_path / "split/train.zip").write_bytes(b"")  # the zip that the folder was unpacked from
    folders(tmp_path / "Kaggle/Training", dict.fromkeys(CLASSES, 2))
    folders(tmp_path / "Kaggle/Testing", dict.fromkeys(CLASSES, 1))
    folders(tmp_path / "alone/train", dict.fromkeys(CLASSES, 2))
    write_csv(tmp_path / "t.csv", flat(tmp_path))
    write_csv(tmp_path / "train.csv", flat(tmp_path))
    for path, expected in (
        ("whole", {"source": "folder", "test_share": 0.2}),
        ("split", {"source": "folder", "train_split": "train", "test_split": "valid"}),
        ("Kaggle", {"source": "folder", "train_split": "Training", "test_split": "Testing"}),
        ("alone", {"path": str(tmp_path / "alone/train"), "test_share": 0.2}),
        ("t.csv", {"source": "table", "test_share": 0.2}),
        ("", {"path": str(tmp_path / "train.csv"), "test_share": 0.2}),
    ):
        found = discover.settings_of(str(tmp_path / path), given)
        assert found.items() >= expected.items()
        assert (found["labels"], found["image_size"], found["channels"]) == (3, 8, 3)
        assert found["mean"][1:] == (0.0, 0.0) and found["mean"][0] > 0
        config = DataConfig(**found)
        assert len(load_source(config, config.train_split)) > 0
        assert len(load_source(config, config.test_split)) > 0
    for name in CLASSES:
        draw(tmp_path / "grey" / name / "0.png", 255, "L")
        draw(tmp_path / "grey" / name / "1.png", 0, "L")
    found = discover.settings_of(str(tmp_path / "grey"), given)
    assert (found["channels"], found["mean"], found["std"]) == (1, (0.5,), (0.5,))
    np.testing.assert_allclose(load_source(DataConfig(**found), "train")[0]["image"] % 255, 0)
    assert discover.settings_of(str(tmp_path / "t"), given) == {}
    with pytest.raises(ValueError, match="has images but no class folders; move them into"):
        discover.settings_of(str(tmp_path / "pictures"), given)


@pytest.mark.parametrize(
    ("source", "closed"),
    [
        ("folder", "train"),
        ("folder", "train/bee"),
        ("folder", "val.txt"),
        ("folder", "val"),
        ("folder", "test.zip"),
        ("table", "train.csv"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, source, closed, make_unreadable):
    folders(tmp_path / "train", dict.fromkeys(CLASSES, 1))
    draw(tmp_path / "val/a0.png", 0)
    (tmp_path / "val.txt").write_text("a0 ant\n")
    write_csv(tmp_path / "train.csv", [("val/a0.png", "ant")])
    (tmp_path / "test.zip").touch()
    make_unreadable(tmp_path / closed)
    split = re.match(r"\w+", closed)[0]
    with pytest.raises(OSError, match=re.escape(f"{closed}' cannot be read (Permission")) as error:
        open_source(data_of(tmp_path, source), split)
    assert str(error.value).startswith(f"config.data.path='{tmp_path}': '{tmp_path}/")
    assert str(error.value).endswith("; make it readable, remove it or correct config.data.path")


@pytest.mark.parametrize("kind", ["table", "list"])
@pytest.mark.parametrize("small", ["2", "02"])
def test_numbers_as_classes_sorted_as_text_give_a_warning(tmp_path, kind, small, caplog):
    for name in ("a", "b"):
        draw(tmp_path / f"val/{name}.png", 0)
    rows = [("val/a.png", small), ("val/b.png", "10")]
    write_csv(tmp_path / "val.csv", rows)
    (tmp_path / "val.txt").write_text("".join(f"{file},{label}\n" for file, label in rows))
    source = open_source(data_of(tmp_path, "table" if kind == "table" else "folder"), "val")
    assert source.label_names == tuple(sorted((small, "10")))
    warned = f"val.{'csv' if kind == 'table' else 'txt'}: classes are numbers, but are sorted as"
    assert (warned in caplog.text) == (small == "2")
    assert ("'10' has label 0; " in caplog.text) == (small == "2")
    assert "use a table" not in caplog.text


def test_path_ignored_by_digits_gives_a_warning(tmp_path, caplog):
    load_source(DataConfig(path=str(tmp_path)), "test")
    assert "is ignored: config.data.source='digits' needs no files" in caplog.text
