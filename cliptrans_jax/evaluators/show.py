"""Translations for people to read: a file with all of them, and a table of some with pictures."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO

import numpy as np
from etils import epath
from PIL import Image

from common_jax.report import Table
from common_jax.workdir import write_bytes

COLUMNS = ("index", "key", "source", "reference", "output", "score")
ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
LETTERS = {escape: letter for letter, escape in ESCAPES.items()}
THUMBNAIL = 128  # pixels of the longer side; twice the size on the page, for high-density screens


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """An output of the search with its score."""

    text: str
    score: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One translated sentence.

    Attributes:
      index: position in the set.
      key: its name there, such as the picture's file.
      source: the sentence.
      reference: the correct translation.
      output: the model's translation.
      score: the search's score of the output.
      others: the other outputs of the search, best first.
      picture: uint8 [I, J, channels] of 1 (grey) or 3 (RGB), or None.
    """

    index: int
    key: str
    source: str
    reference: str
    output: str
    score: float
    others: tuple[Hypothesis, ...] = ()
    picture: np.ndarray | None = None


def write_translations(path: epath.PathLike, rows: Sequence[Row]) -> None:
    r"""Writes the rows without their pictures as tab-separated UTF-8, atomically.

    The first line names the columns: `COLUMNS`, then output_2, score_2, output_3 and so on, empty
    for rows with fewer outputs. Tab, newline, carriage return and backslash in a text are written
    as \t, \n, \r and \\. Quotes have no meaning. `read_translations` reads the file, and so does
    pandas with `sep="\t", quoting=3, keep_default_na=False`, except for the escapes.
    """
    path = epath.Path(path)
    most = max((len(row.others) for row in rows), default=0)
    further = [f"{name}_{i + 2}" for i in range(most) for name in ("output", "score")]
    lines = ["\t".join([*COLUMNS, *further])]
    for row in rows:
        cells = [str(row.index), *map(_escape, (row.key, row.source, row.reference, row.output))]
        cells.append(repr(float(row.score)))
        for other in row.others:
            cells += [_escape(other.text), repr(float(other.score))]
        lines.append("\t".join(cells + [""] * 2 * (most - len(row.others))))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, "".join(line + "\n" for line in lines).encode())


def read_translations(path: epath.PathLike) -> list[Row]:
    """The rows that `write_translations` wrote, without pictures.

    Raises:
      ValueError: for a malformed file, naming the file and line.
    """
    header, *lines = epath.Path(path).read_bytes().decode().removesuffix("\n").split("\n")
    names = header.split("\t")
    if tuple(names[: len(COLUMNS)]) != COLUMNS:
        raise ValueError(f"{path} should begin with the columns {COLUMNS}, not {names}")
    rows = []
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        try:
            if len(cells) != len(names):
                raise ValueError(f"{len(cells)} cells under {len(names)} columns")
            index, *texts, score = cells[: len(COLUMNS)]
            others = tuple(_others(cells[len(COLUMNS) :]))
            rows.append(Row(int(index), *map(_unescape, texts), float(score), others))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {error}; delete the file and score the run again"
            ) from error
    return rows


def picture_table(rows: Sequence[Row], *, limit: int) -> Table:
    """The first `limit` rows as a table for a report, with thumbnails.

    Raises:
      ValueError: for a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, the number of translations to show")
    shown = rows[:limit]
    few = f", the first {len(shown)} of {len(rows):,}" if len(shown) < len(rows) else ""
    return picture_columns(
        shown, {"output": [row.output for row in shown]}, caption=f"Translations{few}"
    )


def picture_columns(
    rows: Sequence[Row], outputs: Mapping[str, Sequence[str]], *, caption: str = "Translations"
) -> Table:
    """Rows with thumbnails, and one column of outputs per model."""
    return Table(
        caption,
        ("picture", "source", "reference", *outputs),
        tuple(
            (
                "" if row.picture is None else _thumbnail(row.picture),
                row.source,
                row.reference,
                *(texts[place] for texts in outputs.values()),
            )
            for place, row in enumerate(rows)
        ),
    )


def _others(cells: Sequence[str]) -> Iterator[Hypothesis]:
    for text, score in zip(cells[::2], cells[1::2], strict=True):
        if score:  # an output may be empty, but its score never is
            yield Hypothesis(_unescape(text), float(score))


def _escape(text: str) -> str:
    return "".join(ESCAPES.get(letter, letter) for letter in text)


def _unescape(text: str) -> str:
    return re.sub(r"\\(.?)", _letter, text)


def _letter(match: re.Match[str]) -> str:
    if match[0] not in LETTERS:
        raise ValueError(f"{match[0]!r} is none of the escapes {sorted(LETTERS)}")
    return LETTERS[match[0]]


def _thumbnail(picture: np.ndarray) -> bytes:
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = BytesIO()
    image.save(file, "png", optimize=True)
    return file.getvalue()
