"""Image files listed with their classes, in a table or in a list beside a flat folder."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from common_jax.inputs.names import printable, require_distinct
from common_jax.inputs.tables import SPLIT, Table, find_table, is_table, read_table, table_names
from common_jax.inputs.texts import read_lines
from common_jax.ranges import did_you_mean
from m2mkd_jax.data.files.folders import (
    SplitFiles,
    find_folder,
    label_rows,
    require_path,
    warn_of_numbers,
)
from m2mkd_jax.data.files.listing import DirectoryFiles, is_hidden, is_image, listed

PATH, LABEL = "path", "label"  # columns, besides SPLIT


def find_listed(path: str, split: str) -> SplitFiles:
    """Lists the images of a table (TSV, CSV or JSONL) with the columns `path` and `label`.

    Paths are relative to the table's folder; labels are class names, and classes are sorted as
    strings. PATH is a folder with a table for each split, or one table with a column `split`. An
    empty `split` means all rows of one table. An image in several splits is only warned of.

    Raises:
      FileNotFoundError: no such path, or no table of the split.
      ValueError: a malformed table, or one without the columns or the split; a row without a path,
        a label or a split; an image that is listed twice in the split, or anywhere with another
        label.
    """
    root = require_path(path, "a table of images, or the folder with SPLIT.csv")
    file = find_table(root, split) if root.is_dir() and split else root
    if file is None or not (file.is_file() and is_table(file)):
        there = table_names(root) if root.is_dir() else []
        raise FileNotFoundError(
            f"config.data.path={path!r} has no table for split {split!r}"
            f"{did_you_mean(split, there)}, only: {listed(there) or 'nothing'}; give the path of "
            "one .csv, .tsv or .jsonl, or of the folder with one for each split"
        )
    table = read_table(file)
    table.require(PATH, "the images' paths")
    table.require(LABEL, "their classes")
    whole = split and not root.is_dir()
    without = "; without it, set config.data.test_share"
    rows = table.rows_of(split, without) if whole else table.rows
    if not rows:
        splits = sorted({row.get(SPLIT, "") for _, row in table.rows})
        raise ValueError(
            f"{file} has no images of split {split!r}{did_you_mean(split, splits)}, only of: "
            f"{listed(splits) or 'none'}; correct config.data.train_split or config.data.test_split"
        )
    for number, row in rows:
        if empty := [column for column in (PATH, LABEL) if not row[column]]:
            raise ValueError(f"{file}, line {number}, column {empty[0]!r} is empty; fill it")
    _require_one_label(table, split if whole else "")
    return _labelled(file.parent, [(row[PATH], row[LABEL]) for _, row in rows], at=str(file))


def _require_one_label(table: Table, split: str) -> None:
    """Raises ValueError if any rows give one image two labels; warns of images of `split` that are
    in other splits too."""
    first: dict[str, tuple[int, str]] = {}
    inside, outside = set(), set()
    for number, row in table.rows:
        if not (row[PATH] and row[LABEL]):
            continue  # refused in a split that is read
        place, label = _place(table.path.parent, row[PATH]), row[LABEL]
        line, other = first.setdefault(place, (number, label))
        if label != other:
            raise ValueError(
                f"{table.path}, lines {line} and {number} give the image {printable(row[PATH])!r} "
                f"the labels {other!r} and {label!r}; remove one of them"
            )
        (inside if not split or row[SPLIT] == split else outside).add(place)
    if shared := inside & outside:
        logging.warning(
            "%s: %d images of split %r are in other splits too: %s",
            *(table.path, len(shared), split, listed(shared)),
        )


def _place(folder: Path, name: str) -> str:
    return os.path.abspath(os.path.join(folder, name))


def find_images(path: str, split: str) -> SplitFiles:
    """Lists the images of a folder (`find_folder`), or of a flat folder with a list `SPLIT.txt`
    beside it (`find_flat`)."""
    root = Path(os.path.expanduser(path))
    list_file = root / f"{split}.txt"
    if list_file.is_file() and (root / split).is_dir():
        with os.scandir(root / split) as entries:
            flat = not any(entry.is_dir() for entry in entries if not is_hidden(entry.name))
        if flat:
            return find_flat(root, split, list_file)
    return find_folder(path, split)


def find_flat(root: Path, split: str, list_file: Path) -> SplitFiles:
    """Lists the images of ROOT/SPLIT/, which has no class folders, with classes from a list.

    A line of the list is a file and its class, separated by a tab, comma or space; or only a class,
    for the images in the order of their names, if that is the same as text and by their numbers.

    Raises:
      ValueError: the list does not fit the images; the message names file and line.
    """
    images = sorted(name for name in os.listdir(root / split) if is_image(name))
    lines = [(i, line) for i, line in enumerate(read_lines(list_file), start=1) if line]
    # A list may name files with or without their suffix.
    known = {name.rpartition(".")[0]: name for name in images} | {name: name for name in images}
    separator = _separator([line for _, line in lines], known)
    if separator is None:
        if len(lines) != len(images):
            raise ValueError(
                f"{list_file} has {len(lines)} classes, one per line, but {root / split} has "
                f"{len(images)} images; write FILE and CLASS in each line, or correct the list: no "
                f"line begins with a file there ({listed(images[:2]) or 'it has no image'})"
            )
        if _depends_on_order(images):
            raise ValueError(
                f"{list_file} has one class per line, but {root / split} has numbers without "
                f"leading zeros, {images[0]}, {images[1]}, ..., whose order is not clear; write "
                "FILE and CLASS in each line"
            )
        rows = [(name, label) for name, (_, label) in zip(images, lines, strict=True)]
    else:
        rows = []
        for number, line in lines:
            name = _file_of(line, separator, known)
            label = line.partition(separator)[2]
            if name is None or not label.strip():
                raise ValueError(
                    f"{list_file}, line {number} must have a file of {root / split} and its class, "
                    f"separated by {separator!r}; it is {line!r}"
                )
            rows.append((name, label.strip()))
        if missing := set(images) - {name for name, _ in rows}:
            raise ValueError(
                f"{list_file} has no class for {len(missing)} images of {root / split}: "
                f"{listed(missing)}; add or remove them"
            )
    logging.info("%s: classes of %d images are from %s", root / split, len(rows), list_file)
    return _labelled(root, [(f"{split}/{name}", label) for name, label in rows], at=str(list_file))


def _separator(lines: Sequence[str], known: Mapping[str, str]) -> str | None:
    """Returns what separates files from classes; None if the lines are classes, of one or several
    words."""
    marks = "\t, "
    with_file = (mark for mark in marks if any(_file_of(line, mark, known) for line in lines))
    # Images that are missing or come last: the list is wrong, and must not be taken for classes.
    with_image = (mark for mark in marks if any(_has_image(line, mark) for line in lines))
    return next(with_file, next(with_image, None))


def _file_of(line: str, mark: str, known: Mapping[str, str]) -> str | None:
    file, found, _ = line.partition(mark)
    return known.get(file.strip().rpartition("/")[2]) if found else None


def _has_image(line: str, mark: str) -> bool:
    return mark in line and any(is_image(part.strip()) for part in line.split(mark))


def _depends_on_order(images: Sequence[str]) -> bool:
    """Returns True for names that differ only in numbers and are sorted otherwise as text."""
    stems = [name.rpartition(".")[0] for name in images]
    numbers = [[int(digits) for digits in re.findall(r"\d+", stem)] for stem in stems]
    return len({re.sub(r"\d+", "0", stem) for stem in stems}) == 1 and numbers != sorted(numbers)


def _labelled(root: Path, rows: Sequence[tuple[str, str]], *, at: str) -> SplitFiles:
    require_distinct((_place(root, name) for name, _ in rows), at=at)
    classes = sorted({label for _, label in rows})
    warn_of_numbers(classes, at=at)
    labels = label_rows(rows, classes, at=at)
    return SplitFiles(DirectoryFiles(root, tuple(name for name, _ in rows)), labels, tuple(classes))
