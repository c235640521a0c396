"""Pieces of a batch, from the processes that read to the one that trains.

They go through shared memory that is reused. Fresh memory costs several times what the copying
does, since the kernel clears every page and both processes map it: examples of 224 x 224 pixels
pass six times as fast as through grain's own shared memory, which is made for every piece, and
reading JPEGs in two processes is at 0.94 of plain PIL's rate instead of 0.86 (docs/performance.md).

Each sender has a ring of slots as large as its first piece, and the receiver writes into the ring's
head how many pieces it has copied out. A piece that is larger, or finds no free slot, is sent by
grain: no one waits for a ring, and the result is the same.

The receiver names the rings and removes them: a sender may have ended before its last pieces are
received, and may be killed at any time.
"""

import contextlib
import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterable
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from common_jax.inputs.examples import BadExample, Batch, Outcome

HEAD = 64  # bytes before the first slot; arrays start at multiples of it
COUNT = "q"  # the content of the head: how many pieces the receiver has copied out


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a piece, `start` bytes into its slot."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def array(self, ring: SharedMemory, slot: int) -> np.ndarray:
        """The array in the slot that begins at byte `slot` of the ring."""
        return np.ndarray(self.shape, self.dtype, ring.buf, slot + self.start)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Sent for a piece that was written to a ring: the `number`-th there, in the slot that begins
    at byte `slot`."""

    ring: str
    number: int
    slot: int
    fields: tuple[Field, ...]


class Sender:
    """Turns outcomes into a message to a `Receiver`; can be pickled until it is first called.

    Args:
      names: the beginning of the rings' names; each sender takes the first that is free.
      slots: pieces that the ring holds; more than can be under way are of no use. All are soon
        written to, whether or not anything waits.
    """

    def __init__(self, names: str, slots: int):
        self.names = names
        self.slots = slots
        self._ring: SharedMemory | None = None
        self._slot_size = self._placed = 0

    def __call__(self, outcomes: list[Outcome]) -> Reference | Batch | list[Outcome]:
        if not _alike(outcomes):
            return outcomes
        fields, size = [], 0
        for name, value in outcomes[0].items():
            fields.append(Field(name, value.dtype, (len(outcomes), *value.shape), size))
            size += _padded(len(outcomes) * value.nbytes)
        if self._ring is None:
            self._make_ring(size)
        if size > self._slot_size or self._placed - self._done[0] >= self.slots:
            return {x.name: np.stack([outcome[x.name] for outcome in outcomes]) for x in fields}
        slot = HEAD + self._placed % self.slots * self._slot_size
        for x in fields:
            np.stack([outcome[x.name] for outcome in outcomes], out=x.array(self._ring, slot))
        self._placed += 1
        return Reference(self._ring.name, self._placed - 1, slot, tuple(fields))

    def _make_ring(self, size: int) -> None:
        self._slot_size = size
        for name in _names(self.names):
            with contextlib.suppress(FileExistsError):
                self._ring = SharedMemory(name, create=True, size=HEAD + self.slots * size)
                break
        self._done = self._ring.buf[:HEAD].cast(COUNT)
        weakref.finalize(self, _close, self._ring, self._done)


class Receiver:
    """Turns messages of `Sender`s into outcomes, copied out of the rings.

    Args:
      names: as of the senders.
      senders: the most that there are.
    """

    def __init__(self, names: str, senders: int):
        self.names = names
        self.senders = senders
        self._rings: dict[str, tuple[SharedMemory, memoryview]] = {}

    def __call__(self, sent: Reference | Batch | list[Outcome]) -> Iterable[Outcome]:
        if isinstance(sent, Reference):
            sent = self._copied(sent)
        if isinstance(sent, list):
            return sent
        count = len(next(iter(sent.values())))
        # `...` keeps a scalar an array, so that strings keep their width.
        return ({name: value[row, ...] for name, value in sent.items()} for row in range(count))

    def _copied(self, piece: Reference) -> Batch:
        if piece.ring not in self._rings:
            ring = SharedMemory(piece.ring)
            self._rings[piece.ring] = ring, ring.buf[:HEAD].cast(COUNT)
        ring, done = self._rings[piece.ring]
        # Only the pieces before this one are reported as done: the queue brought this one after
        # they were copied, so no reordering by the processor lets the sender see it too early.
        done[0] = piece.number
        return {field.name: field.array(ring, piece.slot).copy() for field in piece.fields}

    def close(self) -> None:
        """Removes all rings, also those of senders from which nothing came; all have ended."""
        for ring, done in self._rings.values():
            _close(ring, done)
        self._rings.clear()
        for name in itertools.islice(_names(self.names), self.senders):
            with contextlib.suppress(FileNotFoundError):
                ring = SharedMemory(name)
                ring.unlink()
                ring.close()


def _names(names: str) -> Iterable[str]:
    return (f"{names}-{number}" for number in itertools.count())


def _close(ring: SharedMemory, done: memoryview) -> None:
    done.release()
    ring.close()


def _alike(outcomes: list[Outcome]) -> bool:
    """Whether all are examples that can be stacked and unstacked without loss."""
    first, *others = map(_kinds, outcomes)
    if not first or any(dtype.hasobject for dtype, _ in first.values()):
        return False
    return all(other == first for other in others)


def _kinds(outcome: Outcome) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Types and shapes of an example's arrays; none for a bad one."""
    if isinstance(outcome, BadExample):
        return {}
    return {name: (value.dtype, value.shape) for name, value in outcome.items()}


def _padded(size: int) -> int:
    return math.ceil(size / HEAD) * HEAD
