"""Sequences of unequal length, without a Python object for each element.

In a list, a sentence takes 50 to 110 bytes on top of its text or ids, and creating all of them
takes as long as reading the file. Here, elements are created on access.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int, Int32, Integer, UInt8

PIECE = 1 << 16  # texts joined at a time
Items = TypeVar("Items", bound=Sequence)


@dataclasses.dataclass(frozen=True, eq=False)
class Ragged(Sequence):
    """One-dimensional arrays, stored as slices of one flat array.

    Attributes:
      flat: the elements of all arrays; may be memory-mapped.
      starts: offset of each array in `flat`.
      lengths: length of each array.
    """

    flat: Integer[np.ndarray, " _"]
    starts: Int[np.ndarray, " B"]
    lengths: Int[np.ndarray, " B"]

    @classmethod
    def of(cls, flat: Integer[np.ndarray, " _"], lengths: Int[np.ndarray, " B"]) -> "Ragged":
        """The arrays of these lengths that follow one another in `flat`."""
        return cls(flat, np.cumsum(lengths, dtype=np.int64) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(index)
        start = self.starts[operator.index(index)]
        return self.flat[start : start + self.lengths[index]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))

    def take(self, rows: Int[np.ndarray, " _"] | slice) -> "Ragged":
        """The arrays at `rows`, sharing the same `flat`."""
        return Ragged(self.flat, self.starts[rows], self.lengths[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Lines(Sequence):
    """Texts, decoded on access; equal to any sequence of the same texts.

    Attributes:
      utf8: the bytes of each text.
    """

    utf8: Ragged

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Lines":
        """Encodes a sequence of texts."""
        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
        return cls(Ragged.of(np.frombuffer(b"".join(encoded), np.uint8), lengths))

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Bytes of each text."""
        return self.utf8.lengths

    def __len__(self) -> int:
        return len(self.utf8)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(index)
        return self.utf8[index].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def take(self, rows: Int[np.ndarray, " _"] | slice) -> "Lines":
        """The texts at `rows`."""
        return Lines(self.utf8.take(rows))


@dataclasses.dataclass(frozen=True, eq=False)
class Picked(Sequence):
    """Elements picked from several sequences, such as one sequence per language.

    Attributes:
      parts: the sequences, or arrays whose rows are the elements.
      part: index of the sequence that each element is from.
      rows: each element's place in its sequence.
    """

    parts: tuple[Any, ...]
    part: UInt8[np.ndarray, " B"]
    rows: Int32[np.ndarray, " B"]

    @classmethod
    def of(
        cls, by_name: Mapping[str, Any], names: Sequence[str], rows: Int32[np.ndarray, " B"]
    ) -> "Picked":
        """Picks, for each name, the element at its row from the sequence of that name."""
        places = {name: place for place, name in enumerate(by_name)}
        part = np.fromiter((places[name] for name in names), np.uint8, len(names))
        return cls(tuple(by_name.values()), part, rows)

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Length of each element."""
        lengths = np.zeros(len(self), np.int64)
        for place, part in enumerate(self.parts):
            chosen = self.part == place
            lengths[chosen] = lengths_of(part)[self.rows[chosen]]
        return lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(index)
        return self.parts[self.part[index]][self.rows[index]]

    def take(self, rows: Int[np.ndarray, " _"] | slice) -> "Picked":
        """The elements at `rows`."""
        return Picked(self.parts, self.part[rows], self.rows[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Chain(Sequence):
    """The texts of several sequences, one sequence after the other."""

    parts: tuple[Sequence[str], ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> str:
        row = range(len(self))[index]
        for part in self.parts:
            if row < len(part):
                break
            row -= len(part)
        return part[row]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.parts)


def joined(texts: Sequence[str]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of `"\n".join(texts)`, piece by piece."""
    between = False
    for part in texts.parts if isinstance(texts, Chain) else (texts,):
        for first in range(0, len(part), PIECE):
            if between:
                yield b"\n"
            yield _joined(part[first : first + PIECE])
            between = True


def _joined(texts: Sequence[str]) -> bytes | memoryview:
    if isinstance(texts, Lines):
        flat, starts = texts.utf8.flat, texts.utf8.starts
        ends = starts + texts.lengths
        # Consecutive lines of a file that needed no stripping: return its bytes as they are.
        if (starts[1:] == ends[:-1] + 1).all() and (flat[ends[:-1]] == ord("\n")).all():
            return flat[starts[0] : ends[-1]].data
    return "\n".join(texts).encode()


def lengths_of(items: Sequence) -> Int[np.ndarray, " B"]:
    """Returns every element's length; for texts, in bytes or characters, and 0 only for ""."""
    if isinstance(items, Ragged | Lines | Picked):
        return items.lengths
    return np.fromiter(map(len, items), np.int64, len(items))


def elements(items: Sequence, rows: Int[np.ndarray, " _"]) -> list:
    """Returns `[items[row] for row in rows]`; for flat arrays, looks up all rows at once."""
    if isinstance(items, Ragged):
        starts = items.starts[rows]
        ends = (starts + items.lengths[rows]).tolist()
        return [items.flat[start:end] for start, end in zip(starts.tolist(), ends, strict=True)]
    if not isinstance(items, Picked):
        return [items[row] for row in rows]
    part, rows = items.part[rows], items.rows[rows]
    found: list = [None] * len(rows)
    for place in np.unique(part):
        where = np.flatnonzero(part == place)
        for row, element in zip(where, elements(items.parts[place], rows[where]), strict=True):
            found[row] = element
    return found


def take(items: Items, rows: Int[np.ndarray, " _"]) -> Items | tuple:
    """Returns the elements at `rows`."""
    if isinstance(items, Ragged | Lines | Picked):
        return items.take(rows)
    return tuple(items[row] for row in rows)
