"""Readers for a user's own data: parallel text files, and tables with a column per language.

An example may lack a picture, or sentences in some languages. It is left out if it has no sentence
in any of the languages to read or, if pictures are read, no picture.
"""

import collections
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cliptrans_jax.data.corpus import (
    PICTURES,
    TEXTS_ALONE,
    Corpus,
    Numbered,
    log_empty,
    open_folder,
    read_texts,
    require_aligned,
)
from common_jax.inputs.names import listed
from common_jax.inputs.ragged import Lines, lengths_of, take
from common_jax.inputs.tables import SPLIT, find_table, is_table, read_table, table_names
from common_jax.inputs.texts import find_text, read_lines
from common_jax.ranges import did_you_mean

PICTURE = "picture"  # a column of a table, besides the languages and SPLIT
# A language is two letters and perhaps a region; other suffixes, such as "txt", are none.
TEXT_FILE = re.compile(r"(?P<split>.+)\.(?P<language>[a-z]{2}([_-]\w+)?)")
# Usual split names for each field, the most likely first.
SPLITS = {
    "train_split": ("train", "training"),
    "valid_split": ("val", "valid", "validation", "dev"),
    "test_split": ("test", "testing"),
}


def load_text(root: Path, split: str, languages: Sequence[str], *, with_images: bool) -> Corpus:
    """Loads `ROOT/SPLIT.LANGUAGE`, plain or gzipped; a blank line is a missing sentence.

    Line i of `SPLIT.pictures` names the picture of example i, relative to ROOT or `ROOT/images`;
    the file may be missing, and a blank line is a missing picture.

    Raises:
      FileNotFoundError: no such split or language.
      ValueError: files of different lengths or not in UTF-8.
    """
    texts, counts = read_texts(root, split, languages)
    size = next(iter(counts.values()))
    path = find_text(root / f"{split}.{PICTURES}")
    names: Sequence[str] = ("",) * size
    keys, reason = Numbered(split, size), f"{root / split}.{PICTURES}, which names them, is missing"
    unnamed = f"{path}: no line names a picture (all {size} are blank); fill them in"
    if path is not None:
        names, reason = read_lines(path), ""
        counts[str(path)] = len(names)
        keys = tuple(name or f"{split}:{line}" for line, name in enumerate(names, start=1))
    require_aligned(counts)
    roots = (root, root / "images") if with_images else ()
    name = f"text {split}"
    return _choose(name, texts, names, keys, roots=roots, reason=reason, unnamed=unnamed)


def load_table(path: Path, split: str, languages: Sequence[str], *, with_images: bool) -> Corpus:
    """Loads a table (TSV, CSV or JSONL, plain or gzipped) with a column per language.

    PATH is a folder with a table for each split, `SPLIT.tsv` and so on, or one table with a column
    `split`. The column `picture` has paths relative to the table's folder or to `images` in it; the
    column may be missing, and its cells may be empty.

    Raises:
      FileNotFoundError: no such table.
      ValueError: a malformed table, or one without the column or split, or with a row that has no
        split; names file and column.
    """
    whole = path.is_file()
    file, folder = (path, path.parent) if whole else (find_table(path, split), path)
    if file is None or not is_table(file):
        splits = table_names(folder)
        raise FileNotFoundError(
            f"config.data.path={str(path)!r} has no {split}.tsv, .csv or .jsonl, only the tables "
            f"{listed(splits) or 'nothing'}{did_you_mean(split, splits)}; correct "
            "config.data.path or the split, or give the path of one table with a column 'split'"
        )
    table = read_table(file)
    rows = table.rows_of(split) if whole else table.rows
    if not rows:
        splits = sorted({row.get(SPLIT, split) for _, row in table.rows})
        raise ValueError(
            f"{file} has no row of split {split!r}{did_you_mean(split, splits)}, only of: "
            f"{listed(splits) or 'nothing'}; correct the split or the table"
        )
    for language in languages:
        table.require(language, f"sentences in {language!r}")
    texts = {code: Lines.of([row[code] for _, row in rows]) for code in languages}
    names = tuple(row.get(PICTURE, "") for _, row in rows)
    numbers = (number for number, _ in rows)
    keys = tuple(name or f"{file.name}:{line}" for name, line in zip(names, numbers, strict=True))
    reason = "" if PICTURE in table.columns else f"{file} has no column {PICTURE!r}"
    roots = (folder, folder / "images") if with_images else ()
    unnamed = (
        f"{file}: no row of split {split!r} has a picture (column {PICTURE!r} is empty in all "
        f"{len(rows)} rows); fill it in"
    )
    name = f"table {split}"
    return _choose(name, texts, names, keys, roots=roots, reason=reason, unnamed=unnamed)


def settings_of(path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of config.data that load the sentences at `path`; {} if there are none.

    Args:
      path: a folder, or a table.
      given: the config.data to adapt; its languages and splits are kept if they exist there.

    Raises:
      ValueError: a table cannot be read.
    """
    root = Path(path).expanduser()
    if (root.is_file() and is_table(root)) or (root.is_dir() and table_names(root)):
        source, (languages, splits) = "table", _columns(root, given["train_split"])
    elif root.is_dir():
        source, (languages, splits) = "text", _parallel_files(root)
    else:
        return {}
    if len(languages) < 2:
        return {}
    pair = [given[key] for key in ("source_language", "target_language") if given[key] in languages]
    pair += [language for language in languages if language not in pair]
    settings = {"source": source, "path": path}
    settings |= {"source_language": pair[0], "target_language": pair[1]}
    for key, usual in SPLITS.items():
        likely = [name for name in (given[key], *usual) if name in splits]
        settings[key] = likely[0] if likely else given[key]
    # Also if it is the given one: the flags must load the same without those that were given.
    further = tuple(split for split in given["further_tests"] if split in splits)
    return settings | {"further_tests": further}


def _columns(root: Path, train_split: str) -> tuple[list[str], Sequence[str]]:
    """Returns languages and splits of a table, or of a folder with a table per split."""
    splits, file = [], root
    if root.is_dir():
        splits = table_names(root)
        file = find_table(root, train_split if train_split in splits else splits[0])
    assert file is not None
    table = read_table(file)
    languages = [name for name in table.columns if name not in (PICTURE, SPLIT)]
    return languages, splits or sorted({row.get(SPLIT, "") for _, row in table.rows})


def _parallel_files(root: Path) -> tuple[list[str], Sequence[str]]:
    """Returns languages and splits of those files SPLIT.LANGUAGE that have a parallel file."""
    names = (entry.name.removesuffix(".gz") for entry in root.iterdir() if entry.is_file())
    matches = map(TEXT_FILE.fullmatch, names)
    pairs = {(match["split"], match["language"]) for match in matches if match}
    counts = collections.Counter(split for split, _ in pairs)
    splits = [split for split, count in counts.items() if count > 1]
    return sorted({language for split, language in pairs if split in splits}), splits


def _choose(
    name: str,
    texts: Mapping[str, Sequence[str]],
    names: Sequence[str],
    keys: Sequence[str],
    *,
    roots: Sequence[Path],
    reason: str,
    unnamed: str,
) -> Corpus:
    """Returns a corpus of the examples that have a sentence and, if `roots` are given, a picture.
    Without any, it is one of texts alone, which says why.

    Args:
      name: name of the corpus.
      texts: sentences by language.
      names: file names of the pictures; "" for an example without one.
      keys: keys of the examples.
      roots: folders to look for each picture in, in this order; () for texts only.
      reason: why there are no pictures; "" if there are.
      unnamed: says that `names` are all blank, with the way out.
    """
    # A sentence in any language is enough: which pairs are complete depends on the stage.
    kept = np.any([lengths_of(sentences) > 0 for sentences in texts.values()], axis=0)
    named = lengths_of(names) > 0
    if not reason and not np.any(kept & named):
        languages = " or ".join(map(repr, texts))
        without = f"no example with a picture has a sentence in {languages}; add some"
        reason = f"{without if np.any(named) else unnamed}, or use a stage without pictures"
    needs_picture = bool(roots) and not reason
    if needs_picture:
        kept &= named
    rows = np.flatnonzero(kept)
    if left_out := len(keys) - len(rows):
        what = "a sentence or a picture" if needs_picture else "any sentence"
        logging.info("%s: %d of %d examples lack %s", name, left_out, len(keys), what)
    images, reason = None, reason if roots else TEXTS_ALONE
    if needs_picture:
        images, reason = open_folder(roots, [names[row] for row in rows])
    if left_out:
        texts = {code: take(sentences, rows) for code, sentences in texts.items()}
        keys = take(keys, rows)
    return log_empty(Corpus(name, texts, images, keys, reason, sparse=True))
