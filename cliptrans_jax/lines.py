"""Lines of text to translate, read and translated incrementally."""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cliptrans_jax.evaluators.show import Hypothesis
from cliptrans_jax.loading import LoadedModel
from cliptrans_jax.stages import STAGES
from common_jax.inputs.pictures import decode_picture, read_file
from common_jax.inputs.texts import read_whole_lines

ENDLESS = 2**31  # more tokens than any sentence has


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a file.

    Attributes:
      place: file and line number, for messages.
      text: the sentence; "" for a blank line.
      picture: its picture file, or None.
      tabbed: whether a tab precedes the text, which then may name a picture without a sentence.
    """

    place: str
    text: str
    picture: Path | None = None
    tabbed: bool = False

    @classmethod
    def of(cls, place: str, whole: str) -> "Line":
        """A line as it was read, with the white space around its text."""
        before = whole[: len(whole) - len(whole.lstrip())]
        return cls(place, whole.strip(), tabbed="\t" in before)

    @property
    def blank(self) -> bool:
        """True if there is nothing to translate."""
        return not self.text and self.picture is None


def read_sentences(path: Path) -> list[Line]:
    """The lines of a UTF-8 text file, plain or gzipped; raises ValueError as
    `read_whole_lines`."""
    return [Line.of(f"{path}, line {i}", text) for i, text in enumerate(read_whole_lines(path), 1)]


def read_stream(stream: BinaryIO, name: str) -> Iterator[Line]:
    """Yields the lines of a UTF-8 stream as they arrive; raises ValueError for other bytes."""
    for number, line in enumerate(stream, start=1):
        place = f"{name}, line {number}"
        try:
            yield Line.of(place, line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place} is not UTF-8 ({error.reason} at byte {error.start}); convert the text, "
                "for example with iconv"
            ) from error


def add_pictures(
    lines: Iterable[Line], pictures: Path, names: Iterable[str] | None = None
) -> Iterator[Line]:
    """Yields the lines with their pictures; a line without text and name stays blank.

    Args:
      lines: sentences; without `names`, each is followed by a tab and the name of its picture. The
        sentence may be empty.
      pictures: folder of the pictures, or one picture for all lines.
      names: names of the pictures, one per line.

    Raises:
      ValueError: if a line has no name, or the numbers of lines and names differ.
      FileNotFoundError: if a picture does not exist.
    """
    if not pictures.exists():
        raise FileNotFoundError(f"--pictures={pictures} does not exist; give a folder or a picture")
    if pictures.is_file():
        if names is not None:
            raise ValueError(
                f"--pictures={pictures} is one picture; with --picture-names give a folder"
            )
        for line in lines:
            yield dataclasses.replace(line, picture=pictures if line.text else None)
        return
    pairs = ((line, None) for line in lines)
    if names is not None:
        pairs = itertools.zip_longest(lines, names)
    for line, name in pairs:
        if line is None or (names is not None and name is None):
            more, fewer = "sentences", "names of pictures"
            if line is None:
                more, fewer = fewer, more
            raise ValueError(f"there are more {more} than {fewer}; give one name per line")
        text = line.text
        if name is None:
            text, _, name = (part.strip() for part in text.partition("\t"))
            if line.tabbed and not name:
                text, name = "", text
        if not text and not name:
            yield line
            continue
        if not name:
            raise ValueError(
                f"{line.place} names no picture: write the sentence, a tab, and a file in "
                f"{pictures}, or give the names with --picture-names"
            )
        if not (path := pictures / name).is_file():
            raise FileNotFoundError(f"{line.place}: there is no picture {path}")
        yield dataclasses.replace(line, text=text, picture=path)


def translate_lines(
    model: LoadedModel, lines: Iterable[Line], *, size: int
) -> Iterator[tuple[Line, list[Hypothesis]]]:
    """Yields every line with its hypotheses, best first; blank lines have none.

    Args:
      model: the model. Sentences that are too long for it are truncated, with a warning each.
      lines: any number of lines. Apart from blank ones, all or none have a picture.
      size: lines that are read and translated at a time.
    """
    lines = iter(lines)
    while part := list(itertools.islice(lines, size)):
        written = [line for line in part if not line.blank]
        _warn_of_cuts(model, written)
        found = iter(_translate(model, written) if written else ())
        for line in part:
            yield line, [] if line.blank else next(found)


def open_picture(path: Path, place: str) -> np.ndarray:
    """The pixels of a picture, uint8 (I, J, 3); raises ValueError, with `place`, if it cannot be
    read."""
    try:
        return np.asarray(decode_picture(read_file(path), channels=3))
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: the picture {path} cannot be read: {error}") from error


def _translate(model: LoadedModel, lines: list[Line]) -> list[list[Hypothesis]]:
    sentences, pictures = [line.text for line in lines], None
    if lines[0].picture is not None:
        pictures = [open_picture(line.picture, line.place) for line in lines]
    return model.translate(sentences, pictures=pictures)


def _warn_of_cuts(model: LoadedModel, lines: list[Line]) -> None:
    tokenizer = model.tokenizer
    whole = dataclasses.replace(tokenizer, limit=ENDLESS)
    if STAGES[model.config.stage].captioning:
        return  # the encoder reads no sentences
    source = model.pair[0]
    for line, ids in zip(lines, whole.encode([x.text for x in lines], source), strict=True):
        if len(ids) > tokenizer.limit:
            logging.warning(
                "%s has %d tokens, but the model only reads the first %d",
                line.place,
                len(ids) - 2,  # without the frame
                tokenizer.limit - 2,
            )
