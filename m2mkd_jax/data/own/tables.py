"""Image files listed with their classes, in a table or in a list beside a flat folder."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from common_jax.inputs.names import require_distinct
from common_jax.inputs.tables import find_table, is_table, read_table, table_names
from common_jax.inputs.texts import read_lines
from common_jax.ranges import did_you_mean
from m2mkd_jax.data.folders import (
    SplitFiles,
    find_folder,
    label_rows,
    require_path,
)
from m2mkd_jax.data.listing import DirectoryFiles, is_hidden, is_image, listed

PATH, LABEL, SPLIT = "path", "label", "split"  # columns


def find_listed(path: str, split: str) -> SplitFiles:
    """Lists the images of a table (TSV, CSV or JSONL) with the columns `path` and `label`.

    Paths are relative to the table's folder; labels are class names, and classes are sorted as
    strings. PATH is a folder with a table for each split, or one table with a column `split`. An
    empty `split` means all rows of one table.

    Raises:
      FileNotFoundError: no such path, or no table of the split.
      ValueError: a malformed table, or one without the columns or the split; a row without a path
        or a label; an image that is listed twice.
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
    rows = table.rows
    if split and not root.is_dir():
        table.require(SPLIT, "each row's split; without it, set config.data.test_share")
        rows = tuple(row for row in rows if row[1][SPLIT] == split)
    if not rows:
        splits = sorted({row.get(SPLIT, "") for _, row in table.rows})
        raise ValueError(
            f"{file} has no images of split {split!r}{did_you_mean(split, splits)}, only of: "
            f"{listed(splits) or 'none'}; correct config.data.train_split or config.data.test_split"
        )
    for number, row in rows:
        if empty := [column for column in (PATH, LABEL) if not row[column]]:
            raise ValueError(f"{file}, line {number}, column {empty[0]!r} is empty; fill it")
    return _labelled(file.parent, [(row[PATH], row[LABEL]) for _, row in rows], at=str(file))


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
    for the images in the order of their names.

    Raises:
      ValueError: the list does not fit the images; the message names file and line.
    """
    images = sorted(name for name in os.listdir(root / split) if is_image(name))
    lines = [(i, line) for i, line in enumerate(read_lines(list_file), start=1) if line]
    # A list may name files with or without their suffix.
    known = {name.rpartition(".")[0]: name for name in images} | {name: name for name in images}
    separator = next((mark for mark in "\t, " if lines and mark in lines[0][1]), None)
    if separator is None:
        if len(lines) != len(images):
            raise ValueError(
                f"{list_file} has {len(lines)} classes, one per line, but {root / split} has "
                f"{len(images)} images; write FILE and CLASS in each line, or correct the list"
            )
        rows = [(name, label) for name, (_, label) in zip(images, lines, strict=True)]
    else:
        rows = []
        for number, line in lines:
            file, _, label = line.partition(separator)
            name = known.get(file.strip().rpartition("/")[2])
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


def _labelled(root: Path, rows: Sequence[tuple[str, str]], *, at: str) -> SplitFiles:
    require_distinct((name for name, _ in rows), at=at)
    classes = sorted({label for _, label in rows})
    labels = label_rows(rows, classes, at=at)
    return SplitFiles(DirectoryFiles(root, tuple(name for name, _ in rows)), labels, tuple(classes))
