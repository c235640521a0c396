"""Sends pieces of a batch from the processes that read to the process that trains.

Pieces go through shared memory that is reused: fresh memory from the kernel costs several times as
much as the copy, since every page is zeroed and mapped by both processes. Each sender has a ring of
slots as large as its first piece. In the ring's head, the receiver counts the pieces that it has
copied out. A piece that is larger, or finds no free slot, is sent without the ring, so nobody waits
and the result is the same.

The receiver names and removes the rings: a sender may exit before its last pieces are received, or
be killed at any time.
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
COUNT = "q"  # format of the head, the number of pieces that the receiver has copied out


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a piece, `start` bytes into its slot."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def array(self, ring: SharedMemory, slot: int) -> np.ndarray:
        """Returns a view of the array in the slot that begins at byte `slot` of the ring."""
        return np.ndarray(self.shape, self.dtype, ring.buf, slot + self.start)


@dataclasses.dataclass(frozen=True)
class RingPiece:
    """The reference sent for a piece in a ring: its `number` in the order of writing, and the byte
    offset `slot` of its slot."""

    ring: str
    number: int
    slot: int
    fields: tuple[Field, ...]


class Sender:
    """Maps outcomes to a message for a `Receiver`; can be pickled until its first call.

    Args:
      names: prefix of the rings' names; each sender takes the first free name.
      slots: number of pieces in the ring; more than can be in flight are of no use. All slots are
        soon touched, even if nothing ever waits.
    """

    def __init__(self, names: str, slots: int):
        self.names = names
        self.slots = slots
        self._ring: SharedMemory | None = None
        self._slot_size = self._written = 0

    def __call__(self, outcomes: list[Outcome]) -> RingPiece | Batch | list[Outcome]:
        if not _alike(outcomes):
            return outcomes
        fields, size = [], 0
        for name, value in outcomes[0].items():
            fields.append(Field(name, value.dtype, (len(outcomes), *value.shape), size))
            size += math.ceil(len(outcomes) * value.nbytes / HEAD) * HEAD
        if self._ring is None:
            self._make_ring(size)
        if size > self._slot_size or self._written - self._done[0] >= self.slots:
            return {x.name: np.stack([outcome[x.name] for outcome in outcomes]) for x in fields}
        slot = HEAD + self._written % self.slots * self._slot_size
        for x in fields:
            np.stack([outcome[x.name] for outcome in outcomes], out=x.array(self._ring, slot))
        self._written += 1
        return RingPiece(self._ring.name, self._written - 1, slot, tuple(fields))

    def _make_ring(self, size: int) -> None:
        self._slot_size = size
        for name in _names(self.names):
            with contextlib.suppress(FileExistsError):
                self._ring = SharedMemory(name, create=True, size=HEAD + self.slots * size)
                break
        self._done = self._ring.buf[:HEAD].cast(COUNT)
        weakref.finalize(self, _close, self._ring, self._done)


class Receiver:
    """Maps the messages of at most `senders` `Sender`s, whose rings' names begin with `names`, back
    to outcomes in their own memory."""

    def __init__(self, names: str, senders: int):
        self.names = names
        self.senders = senders
        self._rings: dict[str, tuple[SharedMemory, memoryview]] = {}

    def __call__(self, message: RingPiece | Batch | list[Outcome]) -> Iterable[Outcome]:
        if isinstance(message, RingPiece):
            message = self._copy(message)
        if isinstance(message, list):
            return message
        count = len(next(iter(message.values())))
        # With the ellipsis a scalar stays an array, in which strings keep their width.
        return ({name: value[row, ...] for name, value in message.items()} for row in range(count))

    def _copy(self, piece: RingPiece) -> Batch:
        if piece.ring not in self._rings:
            ring = SharedMemory(piece.ring)
            self._rings[piece.ring] = ring, ring.buf[:HEAD].cast(COUNT)
        ring, done = self._rings[piece.ring]
        # Counts only the pieces before this one. The queue that delivered this one is a barrier
        # between their copies and this store, so the sender cannot see the store too early.
        done[0] = piece.number
        return {field.name: field.array(ring, piece.slot).copy() for field in piece.fields}

    def close(self) -> None:
        """Removes all rings, including those of senders that sent nothing. The senders must have
        ended."""
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
    """Returns True for examples that survive stacking and unstacking unchanged."""
    first, *others = map(_kinds, outcomes)
    if not first or any(dtype.hasobject for dtype, _ in first.values()):
        return False
    return all(other == first for other in others)


def _kinds(outcome: Outcome) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Returns the dtypes and shapes of an example's arrays; {} for a bad example."""
    if isinstance(outcome, BadExample):
        return {}
    return {name: (value.dtype, value.shape) for name, value in outcome.items()}
