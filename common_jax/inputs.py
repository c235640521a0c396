"""Batches of a random-access source: which example stands where is computed, never remembered.

The example at a place of an epoch is a function of (seed, epoch, place), so the position of a run
is its global step: nothing to save, and a run goes on exactly on another number of hosts. Random
transforms draw from a generator seeded by (seed, epoch, index), so a resumed run sees the same
pixels as well.

A batch is a dict of numpy arrays with the examples along the first axis. `batch` is always the
global size; each host yields its own consecutive rows.
"""

import dataclasses
import functools
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from etils import epath

Example = dict[str, np.ndarray | np.generic]
Batch = dict[str, np.ndarray]
TrainTransform = Callable[[Example, np.random.Generator], Example]
EvalTransform = Callable[[Example], Example]

# Two streams of one seed: the order of an epoch and the draws of an example must not be the same
# numbers.
ORDER_STREAM, EXAMPLE_STREAM = 0, 1


class BadExample(ValueError):
    """One example that cannot be read: `name` is what to look for (a file), `reason` why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@runtime_checkable
class Source(Protocol):
    """Random access to examples; `arrays` holds all of them stacked where they fit in memory."""

    @property
    def arrays(self) -> dict[str, np.ndarray] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """One example; raises BadExample where it cannot be read."""
        ...


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch: [size] int64, read-only.

    From numpy's legacy generator, whose numbers no numpy version may change: a run started under
    one version resumes exactly under another.

    Raises:
      ValueError: a negative seed.
    """
    order = np.random.RandomState(_bits(seed, ORDER_STREAM, epoch)).permutation(size)
    order.flags.writeable = False
    return order


def example_index(seed: int, epoch: int, position: int, *, size: int) -> int:
    """The example at place `position` (0 <= position < size) of an epoch."""
    return int(epoch_permutation(seed, epoch, size)[position])


def example_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of example `index` in an epoch, wherever and whenever it is read."""
    return np.random.Generator(_bits(seed, EXAMPLE_STREAM, epoch, index))


def _bits(seed: int, stream: int, *path: int) -> np.random.MT19937 | np.random.PCG64:
    if seed < 0:
        raise ValueError(f"config.seed={seed} must not be negative; take any whole number from 0")
    entropy = np.random.SeedSequence((seed, stream, *path))
    kind = np.random.MT19937 if stream == ORDER_STREAM else np.random.PCG64
    return kind(entropy)


def steps_per_epoch(
    size: int,
    batch: int,
    *,
    batch_key: str = "config.optim.batch",
    size_key: str = "config.data.train_split",
) -> int:
    """Whole batches in an epoch, size // batch: the last incomplete one is dropped in training.

    Raises:
      ValueError: no whole batch fits, which would make every epoch empty. The two keys are what the
        message names.
    """
    if not 0 < batch <= size:
        raise ValueError(
            f"{batch_key}={batch} must be from 1 to {size}, the number of examples in {size_key}; "
            f"lower {batch_key} or take more data"
        )
    return size // batch


def host_rows(batch: int, shard: tuple[int, int]) -> slice:
    """The rows of the global batch that host shard[0] of shard[1] yields.

    Raises:
      ValueError: the batch does not divide among the hosts, or no such host.
    """
    host, hosts = shard
    if not 0 <= host < hosts:
        raise ValueError(f"shard={shard} must be (host, hosts) with 0 <= host < hosts")
    if batch < 1 or batch % hosts:
        raise ValueError(
            f"config.optim.batch={batch} must be a positive multiple of the {hosts} hosts; "
            "change config.optim.batch or the number of hosts"
        )
    rows = batch // hosts
    return slice(host * rows, (host + 1) * rows)


class BadExamples:
    """The bad examples met so far: counted once each, reported by name, stopping above a share.

    The share is that of distinct bad examples in the whole source (`size`), so that neither one bad
    file early in a run nor the same file met in every epoch stops it.
    """

    def __init__(self, size: int, bad_share: float, report_path: os.PathLike | str | None):
        self.size = size
        self.bad_share = bad_share
        self.report_path = report_path
        self.found: dict[int, BadExample] = {}

    def add(self, index: int, bad: BadExample) -> None:
        """Counts and reports one; raises ValueError with names and counts above the share."""
        if index in self.found:
            return
        self.found[index] = bad
        logging.warning("bad example %d (%d so far): %s", index, len(self.found), bad)
        if self.report_path is not None:
            _append_line(self.report_path, {"name": bad.name, "reason": bad.reason, "index": index})
        if len(self.found) > self.bad_share * self.size:
            raise self.error(f"more than config.data.bad_share={self.bad_share:g} allows")

    def error(self, why: str) -> ValueError:
        """To be raised: the names and the count of what was found."""
        named = "; ".join(str(bad) for bad in list(self.found.values())[:10])
        more = f"; and {len(self.found) - 10} more" if len(self.found) > 10 else ""
        listed = f" (all of them in {self.report_path})" if self.report_path is not None else ""
        return ValueError(
            f"{len(self.found)} bad examples of {self.size}, {why}: {named}{more}{listed}; "
            "repair or remove them, or raise config.data.bad_share"
        )


def _append_line(path: os.PathLike | str, record: dict) -> None:
    # Read and write anew, not append: object stores cannot append, and the file is short.
    path, line = epath.Path(path), json.dumps(record) + "\n"
    before = path.read_text() if path.exists() else ""
    if line not in before:  # as it is when a resumed run meets it again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(before + line)


def host_report_path(path: os.PathLike | str | None, shard: tuple[int, int]) -> epath.Path | None:
    """The report file of one host: `bad_examples.jsonl`, and `bad_examples.3.jsonl` for host 3."""
    if path is None:
        return None
    path = epath.Path(path)
    return path if shard[0] == 0 else path.with_name(f"{path.stem}.{shard[0]}{path.suffix}")


@dataclasses.dataclass(frozen=True)
class _TrainReader:
    """Reads rows of the global batches; a bad example is a result here, not an exception."""

    source: Source
    transform: TrainTransform | None
    seed: int
    batch: int

    def index(self, step: int, row: int) -> tuple[int, int]:
        """(epoch, example index)."""
        epoch, place = divmod(step, len(self.source) // self.batch)
        position = place * self.batch + row
        return epoch, example_index(self.seed, epoch, position, size=len(self.source))

    def read(self, step: int, row: int) -> Example | BadExample:
        epoch, index = self.index(step, row)
        try:
            example = self.source[index]
            if self.transform is not None:
                example = self.transform(example, example_generator(self.seed, epoch, index))
        except BadExample as bad:
            return bad
        return example


def train_batches(
    source: Source,
    *,
    transform: TrainTransform | None,
    seed: int,
    batch: int,
    start_step: int = 0,
    workers: int = 0,
    bad_share: float = 0.0,
    shard: tuple[int, int] = (0, 1),
    report_path: os.PathLike | str | None = None,
) -> Iterator[Batch]:
    """Training batches from global step `start_step` on, without end.

    Every epoch is a new permutation with its last incomplete batch dropped. Nothing before
    `start_step` is read. A source in memory (`arrays`) without a transform is gathered by index;
    any other is read example by example in `workers` threads (0: in the caller's).

    A bad example is counted, reported and, while at most `bad_share` of the source is bad, replaced
    by the next good row of the same global batch, with that row's pixels: the same on any number of
    hosts.

    Args:
      transform: (example, generator) -> example, with every random number from the generator; None
        for none.
      batch: global batch size; the arrays that come out have batch / hosts rows.
      shard: (this host, number of hosts).
      report_path: a `bad_examples.jsonl` to add to: one line an example, `{"name", "reason",
        "index"}`. Hosts after the first write `bad_examples.HOST.jsonl` beside it.

    Raises:
      ValueError: the batch is larger than the source or does not divide among the hosts; more than
        `bad_share` bad.
    """
    rows = host_rows(batch, shard)
    steps_per_epoch(len(source), batch)
    epoch_permutation(seed, 0, 1)  # a bad seed fails here, not at the first batch
    if source.arrays is not None and transform is None:
        return _gather_train_batches(source.arrays, len(source), seed, batch, start_step, rows)
    reader = _TrainReader(source, transform, seed, batch)
    bad = BadExamples(len(source), bad_share, host_report_path(report_path, shard))
    return _read_train_batches(reader, start_step, rows, workers, bad)


def _gather_train_batches(
    arrays: dict[str, np.ndarray], size: int, seed: int, batch: int, start_step: int, rows: slice
) -> Iterator[Batch]:
    for step in itertools.count(start_step):
        epoch, place = divmod(step, size // batch)
        chosen = epoch_permutation(seed, epoch, size)[place * batch :][rows]
        yield {name: array[chosen] for name, array in arrays.items()}


def _read_train_batches(
    reader: _TrainReader, start_step: int, rows: slice, workers: int, bad: BadExamples
) -> Iterator[Batch]:
    count = rows.stop - rows.start

    def read(position: int) -> Example | BadExample:
        step, row = divmod(position, count)
        return reader.read(step, rows.start + row)

    stream = _stream(start_step * count, sys.maxsize, read, workers, buffer=2 * count)
    for step in itertools.count(start_step):
        examples = [next(stream) for _ in range(count)]
        for row, example in enumerate(examples):
            if isinstance(example, BadExample):
                examples[row] = _next_good(reader, step, rows.start + row, example, bad)
        yield _stack(examples)


def _next_good(
    reader: _TrainReader, step: int, row: int, example: BadExample, bad: BadExamples
) -> Example:
    bad.add(reader.index(step, row)[1], example)
    for ahead in range(1, reader.batch):
        other = (row + ahead) % reader.batch
        example = reader.read(step, other)
        if not isinstance(example, BadExample):
            return example
        bad.add(reader.index(step, other)[1], example)
    raise bad.error(f"which leaves none for the batch of step {step}")


def _stream(
    start: int, stop: int, read: Callable[[int], object], workers: int, buffer: int
) -> Iterator:
    options = grain.ReadOptions(workers, max(buffer, workers) if workers else 0)
    return iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options))


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
) -> Iterator[Batch]:
    """All examples in order, once, the last batch padded.

    `_mask` [B] float32 is 1 on real rows and 0 on padding. Every host yields ceil(size / batch)
    batches of batch / hosts rows, whatever falls to it. A bad example is counted, reported and
    masked out while at most `bad_share` of the source is bad. Arguments as in `train_batches`, but
    that the transform takes no generator.

    Raises:
      ValueError: an empty source, a batch that does not divide among the hosts, more than
        `bad_share` bad.
    """
    rows = host_rows(batch, shard)
    if len(source) == 0:
        raise ValueError("nothing to evaluate: the source is empty; check config.data.test_split")
    if source.arrays is not None and transform is None:
        return _gather_eval_batches(source.arrays, len(source), batch, rows)
    bad = BadExamples(len(source), bad_share, host_report_path(report_path, shard))
    return _read_eval_batches(source, transform, batch, rows, workers, bad)


def _eval_places(size: int, batch: int, rows: slice) -> Iterator[np.ndarray]:
    """The real examples of this host's rows, batch by batch; padding stands only at the end."""
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

    def read(index: int) -> Example | BadExample:
        try:
            example = source[index]
            return example if transform is None else transform(example)
        except BadExample as problem:
            return problem

    def zeros() -> Example:
        """Of the shapes of a real example: this host may have none, so it looks at all."""
        for index in range(len(source)):
            example = read(index)
            if not isinstance(example, BadExample):
                return {name: np.zeros_like(value) for name, value in example.items()}
            bad.add(index, example)
        raise bad.error("which leaves none to evaluate")

    stream = _stream(0, len(order), lambda place: read(int(order[place])), workers, 2 * count)
    blank = None
    for places in batches:
        examples = [next(stream) for _ in places]
        for index, example in zip(places, examples, strict=True):
            if isinstance(example, BadExample):
                bad.add(int(index), example)
        real = [not isinstance(example, BadExample) for example in examples]
        real += [False] * (count - len(real))
        if blank is None and not all(real):
            blank = zeros()
        filled = [blank if isinstance(example, BadExample) else example for example in examples]
        filled += [blank] * (count - len(filled))
        yield _stack(filled) | {"_mask": np.asarray(real, np.float32)}
