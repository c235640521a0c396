"""Batches for training and for evaluation."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np

from common_jax.inputs.examples import (
    REPAIR,
    BadExample,
    BadExamples,
    Batch,
    Example,
    Outcome,
    Source,
    host_report_path,
    name_of,
)
from common_jax.inputs.order import (
    epoch_permutation,
    example_generator,
    example_index,
    host_rows,
    steps_per_epoch,
)
from common_jax.inputs.workers import read_in_order

TrainTransform = Callable[[Example, np.random.Generator], Example]
EvalTransform = Callable[[Example], Example]

ENDLESS = 2**50  # more examples than any run reads; grain needs an end


# A dataclass, not a closure, since it is pickled for worker processes.
@dataclasses.dataclass(frozen=True)
class _TrainReader:
    """Reads rows of the global batches; returns BadExample instead of raising it.

    A call reads one of this host's rows, which are numbered consecutively through all steps.
    """

    source: Source
    transform: TrainTransform | None
    seed: int
    batch: int
    repeats: int
    rows: slice

    def __call__(self, position: int) -> Outcome:
        # Takes a single number, since that is what grain passes to its worker processes.
        step, row = divmod(position, self.rows.stop - self.rows.start)
        return self.read(step, self.rows.start + row)

    def place(self, step: int, row: int) -> tuple[int, int, int]:
        """Returns the epoch, the example's index, and the number of its copy."""
        epoch, place = divmod(step, len(self.source) // self.batch)
        # Copies are adjacent in the order, so all of them fall into one batch, or two.
        position, copy = divmod(place * self.batch + row, self.repeats)
        return epoch, example_index(self.seed, epoch, position, size=len(self.source)), copy

    def read(self, step: int, row: int) -> Outcome:
        epoch, index, copy = self.place(step, row)
        try:
            example = self.source[index]
            if self.transform is not None:
                # Seeded by the example, not the row, so that any host and worker draws the same.
                rng = example_generator(self.seed, epoch, index, copy=copy)
                example = self.transform(example, rng)
        # An exception would end a worker process, and bad examples must be counted in one place.
        except BadExample as bad:
            return bad
        except ValueError as error:
            raise ValueError(f"{name_of(self.source, index)}: {error}") from error
        return example


def train_batches(
    source: Source,
    *,
    transform: TrainTransform | None,
    seed: int,
    batch: int,
    start_step: int = 0,
    repeats: int = 1,
    workers: int = 0,
    bad_share: float = 0.0,
    shard: tuple[int, int] = (0, 1),
    report_path: os.PathLike | str | None = None,
) -> Iterator[Batch]:
    """Returns an endless iterator of training batches, starting at global step `start_step`.

    Every epoch is a new permutation, without its last incomplete batch. Nothing before `start_step`
    is read. A source in memory (`arrays`) without a transform is gathered by index; any other is
    read example by example in `workers` processes (0: in this one), which start with the first
    batch and end with the iterator. Batches are bitwise the same for any number of workers.

    With `repeats` above 1, an epoch has that many consecutive copies of an example, each with its
    own random numbers. The number of steps does not change, so an epoch then covers only one in
    `repeats` examples.

    A bad example is counted, reported and, as long as at most `bad_share` of the source is bad,
    replaced by the next good row of the same global batch, with that row's pixels. The replacement
    does not depend on the number of hosts.

    Args:
      source: the examples.
      transform: maps (example, generator) to an example and draws all random numbers from the
        generator; None for none. With workers, it and the source must be picklable.
      seed: seeds the order and the generators.
      batch: global batch size; the arrays have batch / hosts rows.
      start_step, repeats, workers, bad_share: see above.
      shard: (this host, number of hosts).
      report_path: a `bad_examples.jsonl`, to which a line `{"name", "reason", "index"}` is added
        per bad example. Hosts after the first write `bad_examples.HOST.jsonl` beside it.

    Raises:
      ValueError: if the batch is larger than the source or does not divide among the hosts, or more
        than `bad_share` is bad.
    """
    # Checked now, since the body of a generator runs only when its first batch is requested.
    rows = host_rows(batch, shard)
    steps_per_epoch(len(source), batch)
    epoch_permutation(seed, 0, 1)
    if source.arrays is not None and transform is None:
        order = (seed, len(source), batch, repeats)
        return _gather_train_batches(source.arrays, order, start_step, rows)
    reader = _TrainReader(source, transform, seed, batch, repeats, rows)
    bad = BadExamples(len(source), bad_share, host_report_path(report_path, shard))
    return _read_train_batches(reader, start_step, workers, bad)


def _gather_train_batches(
    arrays: dict[str, np.ndarray], order: tuple[int, int, int, int], start_step: int, rows: slice
) -> Iterator[Batch]:
    seed, size, batch, repeats = order
    # Indexing each array once replaces reading and stacking examples one by one.
    host = np.arange(rows.start, rows.stop)
    for step in itertools.count(start_step):
        epoch, place = divmod(step, size // batch)
        indices = epoch_permutation(seed, epoch, size)[(place * batch + host) // repeats]
        yield {name: array[indices] for name, array in arrays.items()}


def _read_train_batches(
    reader: _TrainReader, start_step: int, workers: int, bad: BadExamples
) -> Iterator[Batch]:
    first = reader.rows.start
    count = reader.rows.stop - first
    positions = range(start_step * count, ENDLESS)
    stream = read_in_order(reader, positions, batch=count, workers=workers)
    # Closed with this generator; otherwise the worker processes would outlive it.
    with contextlib.closing(stream):
        for step in itertools.count(start_step):
            examples = list(itertools.islice(stream, count))
            for row, example in enumerate(examples):
                if isinstance(example, BadExample):
                    examples[row] = _next_good(reader, step, first + row, example, bad)
            yield _stack(examples)


def _next_good(
    reader: _TrainReader, step: int, row: int, example: BadExample, bad: BadExamples
) -> Example:
    bad.add(reader.place(step, row)[1], example)
    # Searches the global batch, not only this host's rows, so that the choice does not depend on
    # the number of hosts. Reads in the training process, since bad examples are rare.
    for offset in range(1, reader.batch):
        other = (row + offset) % reader.batch
        example = reader.read(step, other)
        if not isinstance(example, BadExample):
            return example
        bad.add(reader.place(step, other)[1], example)
    raise bad.error(f", which leaves none for the batch of step {step}", REPAIR)


def _stack(examples: list[Example]) -> Batch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def eval_batches(
    source: Source,
    *,
    transform: EvalTransform | None,
    batch: int,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
    bad_share: float = 0.0,
    report_path: os.PathLike | str | None = None,
    way_out: str = "",
) -> Iterator[Batch]:
    """Returns all examples in order, once, with a padded last batch.

    `_mask` [B] float32 is 1 for real rows and 0 for padding. Every host yields ceil(size / batch)
    batches of batch / hosts rows, even if it has no examples left. A bad example is counted,
    reported and masked out, as long as a host meets no more than `bad_share` of the source.
    Arguments are as in `train_batches`, except that the transform takes no generator, and
    `way_out` as in `BadExamples`.

    Raises:
      ValueError: if the source is empty, the batch does not divide among the hosts, or more than
        `bad_share` is bad.
    """
    rows = host_rows(batch, shard)
    if len(source) == 0:
        raise ValueError("nothing to evaluate: the source is empty; check config.data.test_split")
    if source.arrays is not None and transform is None:
        return _gather_eval_batches(source.arrays, len(source), batch, rows)
    # Of the whole source: of a host's own part, a single example can be more than the share.
    bad = BadExamples(len(source), bad_share, host_report_path(report_path, shard), way_out)
    return _read_eval_batches(source, transform, batch, rows, workers, bad)


def _eval_places(size: int, batch: int, rows: slice) -> Iterator[np.ndarray]:
    """Yields the indices of real examples in this host's rows of each batch; padding comes last."""
    for first in range(0, size, batch):
        yield np.arange(min(first + rows.start, size), min(first + rows.stop, size))


def _gather_eval_batches(
    arrays: dict[str, np.ndarray], size: int, batch: int, rows: slice
) -> Iterator[Batch]:
    count = rows.stop - rows.start
    for places in _eval_places(size, batch, rows):
        padding = count - len(places)
        padded = {
            name: np.pad(array[places], [(0, padding)] + [(0, 0)] * (array.ndim - 1))
            for name, array in arrays.items()
        }
        yield padded | {"_mask": (np.arange(count) < len(places)).astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class _EvalReader:
    """Reads one host's examples, by their places in `order` [n]."""

    source: Source
    transform: EvalTransform | None
    order: np.ndarray

    def __call__(self, place: int) -> Outcome:
        return self.read(int(self.order[place]))

    def read(self, index: int) -> Outcome:
        try:
            example = self.source[index]
            return example if self.transform is None else self.transform(example)
        except BadExample as bad:
            return bad
        except ValueError as error:
            raise ValueError(f"{name_of(self.source, index)}: {error}") from error


def _read_eval_batches(
    source: Source,
    transform: EvalTransform | None,
    batch: int,
    rows: slice,
    workers: int,
    bad: BadExamples,
) -> Iterator[Batch]:
    count = rows.stop - rows.start
    batches = list(_eval_places(len(source), batch, rows))
    order = np.concatenate(batches)
    reader = _EvalReader(source, transform, order)
    stream = read_in_order(reader, range(len(order)), batch=count, workers=workers)
    blank = None
    with contextlib.closing(stream):
        for places in batches:
            examples = list(itertools.islice(stream, len(places)))
            for index, example in zip(places, examples, strict=True):
                if isinstance(example, BadExample):
                    bad.add(int(index), example)
            real = [not isinstance(example, BadExample) for example in examples]
            real += [False] * (count - len(real))
            # All hosts yield the same number of batches, of one shape, and pad when they run out:
            # the compiled evaluation step has collectives that all of them must join.
            if blank is None and not all(real):
                blank = _blank(reader)
            padded = [blank if isinstance(example, BadExample) else example for example in examples]
            padded += [blank] * (count - len(padded))
            yield _stack(padded) | {"_mask": np.asarray(real, np.float32)}


def _blank(reader: _EvalReader) -> Example:
    """Returns zeros in a real example's shapes. Searches all rows, since this host may have no good
    one; the bad ones among them are counted by the hosts that they belong to."""
    for index in range(len(reader.source)):
        example = reader.read(index)
        if not isinstance(example, BadExample):
            return {name: np.zeros_like(value) for name, value in example.items()}
    raise ValueError(
        f"all {len(reader.source)} examples are bad, which leaves none to evaluate: {example}; "
        f"{REPAIR}"
    )
