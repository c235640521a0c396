"""Batches of a stage: sentences grouped by length, padded to a few lengths, tokens dropped anew in
each epoch.

The content of a batch and its padded length depend only on (seed, epoch, place): all hosts agree
on them without communication.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float32, Int64

from cliptrans_jax.data.examples import Examples, NoiseConfig, drop_tokens, pad
from common_jax.config import Section
from common_jax.inputs import (
    epoch_permutation,
    example_generator,
    host_rows,
    steps_per_epoch,
)
from common_jax.inputs.ragged import elements, lengths_of
from common_jax.ranges import Size

Batch = dict[str, np.ndarray]
TRIVIAL = 2  # tokens of a source without words: language code and </s>


@dataclasses.dataclass(frozen=True)
class BatchingConfig(Section):
    """Padding and grouping of sentences.

    Attributes:
      bucket: batches are padded to this many tokens, or 2, 4, ... times as many, so that few
        lengths are compiled.
      half_steps: also pads to 1.5 times each of these lengths: less padding, but twice as many
        programs to compile.
      window: number of batches whose sentences are sorted by length together, which reduces
        padding; 1 keeps the epoch's random order.
    """

    bucket: Size = 16
    half_steps: bool = False
    window: Size = 1

    def padded(self, longest: int) -> int:
        """Returns the padded length of a batch whose longest sentence has `longest` tokens."""
        length = self.bucket * 2 ** max(0, math.ceil(math.log2(longest / self.bucket)))
        half_step = length * 3 // 4  # 1.5 times the next shorter length
        fits = length > self.bucket and longest <= half_step
        return half_step if self.half_steps and fits else length


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The examples of a stage with their features.

    Attributes:
      examples: the sentences.
      features: one CLIP feature per example; None if the model takes none or computes its own.
      clip_tokens: sentences framed for the text tower, if the model runs one to compute features;
        else None.
      pad: the translator's padding id.
      room: positions that the model has left after its prefix, the limit of padded lengths.
      clip_pad, clip_room: the text tower's padding id, which may be another one, and its limit of
        padded lengths; None without `clip_tokens`.
    """

    examples: Examples
    features: Sequence[np.ndarray] | Float32[np.ndarray, "B M"] | None
    clip_tokens: Sequence[np.ndarray] | None
    pad: int
    room: int
    clip_pad: int | None = None
    clip_room: int | None = None

    def __len__(self) -> int:
        return len(self.examples)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: arrays have no hash
class TrainFeed:
    """Training batches of `Inputs`.

    Attributes:
      inputs: the examples with features.
      noise: probability of dropping a token, in stages that drop any.
      batching: padding and grouping.
      batch: global batch size, over all hosts.
      seed: seed of the order and of dropped tokens.
      shard: (this host, number of hosts).
    """

    inputs: Inputs
    noise: NoiseConfig
    batching: BatchingConfig
    batch: int
    seed: int
    shard: tuple[int, int]

    @property
    def steps_per_epoch(self) -> int:
        """Full batches per epoch; the remaining examples are left out."""
        return steps_per_epoch(len(self.inputs), self.batch)

    def batches(self, start: int) -> Iterator[Batch]:
        """Yields batches from global step `start` on, without end."""
        # The step is the only state: a run that resumes in the middle of an epoch computes its
        # place.
        rows = host_rows(self.batch, self.shard)
        for step in itertools.count(start):
            epoch, place = divmod(step, self.steps_per_epoch)
            indices = self._order(epoch)[place * self.batch : (place + 1) * self.batch]
            yield collate(
                self.inputs, indices, rows, self.batching, noise=self.noise,
                seed=self.seed, epoch=epoch,
            )  # fmt: skip

    def shapes(self, micro_batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a global micro-batch; some batches have longer sentences."""
        # Taken from one collated example, so that keys and dtypes match those of real batches.
        example = collate(
            self.inputs, np.arange(1), slice(0, 1), self.batching, noise=self.noise,
            seed=self.seed, epoch=0,
        )  # fmt: skip
        return {
            name: jax.ShapeDtypeStruct((micro_batch, *x.shape[1:]), x.dtype)
            for name, x in example.items()
        }

    def _order(self, epoch: int) -> Int64[np.ndarray, " B"]:
        order = epoch_permutation(self.seed, epoch, len(self.inputs))
        if self.batching.window == 1:
            return order
        return _sort_windows(self, epoch)


# Cached, since sorting takes longer than a batch; two entries, since prefetching crosses epochs.
@functools.lru_cache(maxsize=2)
def _sort_windows(feed: TrainFeed, epoch: int) -> Int64[np.ndarray, " B"]:
    """Sorts the sentences of each window of batches by length, then shuffles its batches."""
    order = epoch_permutation(feed.seed, epoch, len(feed.inputs))
    examples, batch = feed.inputs.examples, feed.batch
    lengths = lengths_of(examples.source) + lengths_of(examples.target)
    # A large factor, so that (seed, epoch) and (seed + 1, epoch - 1) do not share a permutation.
    generator = np.random.RandomState(feed.seed * 1_000_003 % 2**31 + epoch)
    count = len(order) // batch
    batches = []
    for first in range(0, count, feed.batching.window):
        window = order[first * batch : min(first + feed.batching.window, count) * batch]
        by_length = window[np.argsort(lengths[window], kind="stable")].reshape(-1, batch)
        # Shuffled, or lengths would grow within every window.
        batches.extend(by_length[generator.permutation(len(by_length))])
    return np.concatenate(batches)


def collate(
    inputs: Inputs,
    indices: Int64[np.ndarray, " B"],
    rows: slice,
    batching: BatchingConfig,
    *,
    noise: NoiseConfig,
    seed: int,
    epoch: int,
) -> Batch:
    """Collates this host's rows of a batch.

    Args:
      inputs: all examples.
      indices: the examples of the global batch.
      rows: this host's rows of the global batch.
      batching: determines the padded length.
      noise: probability of dropping a token.
      seed, epoch: with the example's number, they determine which tokens are dropped.

    Returns:
      `source` [B, S] and `labels` [B, T] int32, and `features` [B, M] or `clip_tokens` [B, S].
    """
    # Every host must pad to the same shape. So each host drops tokens in the whole global batch and
    # takes the longest sentence of all hosts.
    examples = inputs.examples
    sources = elements(examples.source, indices)
    if examples.drops:
        sources = [
            _drop(ids, (seed, epoch, int(i)), noise.mask_prob)
            for ids, i in zip(sources, indices, strict=True)
        ]
    targets = elements(examples.target, indices)
    source, target = (_padded_length(x, batching, inputs.room) for x in (sources, targets))
    if source > TRIVIAL:
        source = target = max(source, target)  # fewer pairs of lengths to compile
    batch = {
        "source": pad(sources[rows], source, pad_id=inputs.pad),
        "labels": pad(targets[rows], target, pad_id=inputs.pad),
    }
    if inputs.features is not None:
        batch["features"] = np.stack(elements(inputs.features, indices[rows]))
    if inputs.clip_tokens is not None:
        tokens = elements(inputs.clip_tokens, indices)
        length = _padded_length(tokens, batching, inputs.clip_room)
        batch["clip_tokens"] = pad(tokens[rows], length, pad_id=inputs.clip_pad)
    return batch


def batch_shapes(
    batch: int, *, tokens: int, source: int | None = None, features: int = 0, clip_tokens: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of `collate`.

    Args:
      batch: number of examples.
      tokens: padded length of the sentences.
      source: padded length of the encoder's sentences, if it differs.
      features: width of the features; 0 for none.
      clip_tokens: padded length of the text tower's sentences; 0 for none.
    """
    shapes = {
        "source": jax.ShapeDtypeStruct((batch, tokens if source is None else source), np.int32),
        "labels": jax.ShapeDtypeStruct((batch, tokens), np.int32),
    }
    if features:
        shapes["features"] = jax.ShapeDtypeStruct((batch, features), np.float32)
    if clip_tokens:
        shapes["clip_tokens"] = jax.ShapeDtypeStruct((batch, clip_tokens), np.int32)
    return shapes


def evaluation_batches(
    inputs: Inputs,
    *,
    batch: int,
    batching: BatchingConfig,
    noise: NoiseConfig,
    seed: int,
    shard: tuple[int, int],
    by_length: bool = False,
) -> Iterator[Batch]:
    """Yields all examples once; the last batch is filled up with copies of the last example.

    Every batch also has `_mask` [B], 0 for these copies, and `_index` [B], the example. The same
    tokens are dropped in every pass.

    Args:
      inputs: all examples.
      batch: global batch size, over all hosts.
      batching, noise, seed: as in `TrainFeed`.
      shard: (this host, number of hosts).
      by_length: sorts by source length, longest first, so that batches contain little padding.
    """
    order = np.arange(len(inputs))
    if by_length:
        order = np.argsort(-lengths_of(inputs.examples.source), kind="stable")
    rows = host_rows(batch, shard)
    for first in range(0, len(order), batch):
        indices = order[first : first + batch]
        real = np.arange(batch) < len(indices)
        indices = np.pad(indices, (0, batch - len(indices)), mode="edge")
        yield collate(inputs, indices, rows, batching, noise=noise, seed=seed, epoch=0) | {
            "_mask": real[rows].astype(np.float32),
            "_index": indices[rows].astype(np.int32),
        }


def _drop(ids: np.ndarray, place: tuple[int, int, int], mask_prob: float) -> np.ndarray:
    """The tokens to keep; `place` is (seed, epoch, example)."""
    # With mask_prob=1 no draw can matter, and creating a generator is most of the cost of a batch.
    if mask_prob == 1:
        draws = np.zeros(len(ids), np.float32)
    else:
        draws = example_generator(*place).random(len(ids), dtype=np.float32)
    return drop_tokens(ids, draws, mask_prob)


def _padded_length(sentences: Sequence[np.ndarray], batching: BatchingConfig, room: int) -> int:
    longest = max(len(ids) for ids in sentences)
    # Sources without words are not padded to a bucket: in captioning all of it would be padding.
    return longest if longest <= TRIVIAL else min(batching.padded(longest), room)
