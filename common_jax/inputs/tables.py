"""Reads user-supplied tables, TSV, CSV and JSONL, plain or gzipped, as rows of text by column."""

import collections
import csv
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from common_jax.inputs.names import listed
from common_jax.inputs.texts import find_text, read_whole_lines
from common_jax.ranges import did_you_mean
from common_jax.untrusted import RefusedError, brief, parse_json, plain

SPLIT = "split"  # column of a table of several splits
# What to do about a table whose cells are separated by something else than its suffix says.
SEPARATORS = {
    ";": "save it with commas or as TSV",
    "|": "save it with commas or as TSV",
    ",": "rename it to .csv",
    "\t": "rename it to .tsv",
}
Rows = tuple[tuple[int, Mapping[str, str]], ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a table.

    Attributes:
      path: the file.
      columns: column names, in the order of the file.
      rows: (number of the line that the row starts on, its text by column). A row of a JSONL holds
        only the keys of its line, and "" for any other.
    """

    path: Path
    columns: tuple[str, ...]
    rows: Rows

    def require(self, column: str, what: str) -> None:
        """Raises ValueError unless there is a column of this name; `what` says what it should
        hold."""
        if column not in self.columns:
            if hint := _other_separator(self.path, self.columns):
                raise ValueError(f"{self.path} has no column {column!r}: {hint}")
            raise ValueError(
                f"{self.path} has no column {column!r}{did_you_mean(column, self.columns)}, which "
                f"should hold {what}; its columns are {plain(', '.join(self.columns)) or 'none'}"
            )

    def rows_of(self, split: str, without: str = "") -> Rows:
        """Returns the rows whose column SPLIT is `split`, and logs how many rows each split has.

        Raises:
          ValueError: no such column, with `without` as the way out; a row without a split.
        """
        self.require(SPLIT, f"each row's split{without}")
        if empty := [number for number, row in self.rows if not row[SPLIT]]:
            raise ValueError(
                f"{self.path}, line {empty[0]}, column {SPLIT!r} is empty, one of {len(empty)} "
                "such rows; fill it, with some other name for rows that no run should read"
            )
        logging.info("%s has rows of the splits %s", self.path, listed(self.split_sizes()))
        return tuple(row for row in self.rows if row[1][SPLIT] == split)

    def split_sizes(self, *, without: Collection[str] = ()) -> list[str]:
        """Returns the splits and their numbers of rows, as text, except those named."""
        counts = collections.Counter(row[SPLIT] for _, row in self.rows)
        return [f"{name} ({count})" for name, count in counts.items() if name not in ("", *without)]


def find_table(folder: Path, name: str) -> Path | None:
    """Returns the table `name` in a folder, with any of the suffixes; None if there is none.

    Raises:
      ValueError: if there are several.
    """
    paths = [path for suffix in READERS if (path := find_text(folder / f"{name}{suffix}"))]
    if not paths:  # only then: a disk that ignores case would find the same file twice
        upper = map(str.upper, READERS)
        paths = [path for suffix in upper if (path := find_text(folder / f"{name}{suffix}"))]
    if len(paths) > 1:
        names = " and ".join(path.name for path in paths)
        raise ValueError(f"{folder} has both {names}; remove or rename all but one")
    return paths[0] if paths else None


def table_names(folder: Path) -> list[str]:
    """Returns the names, without suffixes, of a folder's tables."""
    tables = (path.name for path in folder.iterdir() if path.is_file() and is_table(path))
    return sorted({name.removesuffix(".gz").rpartition(".")[0] for name in tables})


def is_table(path: Path) -> bool:
    """Returns True if a file has the suffix of a table."""
    return path.name.removesuffix(".gz").lower().endswith(tuple(READERS))


def read_table(path: Path) -> Table:
    """Reads a table in the format given by its suffix. Skips rows without any text.

    A TSV has one row per line, and quotes are ordinary characters. A CSV may quote cells, which may
    then contain commas, quotes (doubled) and line feeds. In both, the first line names the columns.
    A line of a JSONL is an object of texts; a missing key or null is an empty cell.

    Raises:
      ValueError: for a malformed file; the message names file, line and column.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return READERS[suffix](path, read_whole_lines(path))


def _read_tsv(path: Path, lines: Sequence[str]) -> Table:
    return _with_header(path, ((i, line.split("\t")) for i, line in enumerate(lines, start=1)))


def _read_csv(path: Path, lines: Sequence[str]) -> Table:
    def cells() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader((f"{line}\n" for line in lines), strict=True)
        first = 1
        try:
            for row in reader:
                yield first, row
                first = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {first} is not CSV ({error}); double the quotes within a quoted "
                "cell, close a quote left open, or save it as TSV, whose cells may be longer"
            ) from error

    return _with_header(path, cells())


def _with_header(path: Path, lines: Iterator[tuple[int, list[str]]]) -> Table:
    _, header = next(lines, (1, []))
    columns = tuple(name.strip() for name in header)
    if not any(columns):
        raise ValueError(f"{path}, line 1 is empty; it must name the columns")
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise ValueError(f"{path}, line 1 has the column {brief(twice)} twice; rename one")
    rows = []
    for number, cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            missing = ", ".join(columns[len(cells) :])
            problem = f"nothing for {missing}" if missing else f"no name for {brief(cells[-1])}"
            way_out = _other_separator(path, columns) or "correct the line"
            raise ValueError(
                f"{path}, line {number} has {len(cells)} cells and line 1 names {len(columns)} "
                f"columns: {problem}; {way_out}"
            )
        rows.append((number, dict(zip(columns, map(_one_line, cells), strict=True))))
    return Table(path, columns, tuple(rows))


def _other_separator(path: Path, columns: Sequence[str]) -> str:
    """Returns what to do about a table whose first line has a separator of another format; "" if it
    is as its suffix says."""
    if len(columns) != 1 or path.name.removesuffix(".gz").lower().endswith(".jsonl"):
        return ""
    found = [(mark, way_out) for mark, way_out in SEPARATORS.items() if mark in columns[0]]
    return "; ".join(f"it seems to be separated by {mark!r}; {way}" for mark, way in found[:1])


def _read_jsonl(path: Path, lines: Sequence[str]) -> Table:
    columns: dict[str, None] = {}
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line.encode())
        except RefusedError as refused:
            raise ValueError(f"{path}, line {number} {refused}; correct the line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is {brief(record)} and not an object")
        columns |= dict.fromkeys(record)
        cells = ((key, _text(path, number, key, record[key])) for key in record)
        rows.append((number, _Sparse(cells)))
    return Table(path, tuple(columns), tuple(rows))


class _Sparse(dict):
    # Filling every row with every key would take memory in the square of a file's size.
    def __missing__(self, key: str) -> str:
        return ""


def _text(path: Path, number: int, key: str, value: object) -> str:
    """Returns a JSON value as text."""
    if isinstance(value, str):
        if value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value):
            return _one_line(value)
        value = "half of a surrogate pair, which is not a character"
    elif value is None:
        return ""
    elif type(value) is int:  # a label, such as 7
        return str(value)
    raise ValueError(f"{path}, line {number}, column {brief(key)} must be text: {brief(value)}")


def _one_line(cell: str) -> str:
    """Returns a cell stripped and without line breaks."""
    return " ".join(filter(None, (line.strip() for line in cell.splitlines())))


READERS: Mapping[str, Callable[[Path, Sequence[str]], Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}
