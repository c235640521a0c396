"""Batches of a stage: which sentences stand together, padded to few lengths, with other tokens
dropped in every epoch.

What stands where is a function of (seed, epoch, place) alone, and so is the length that a batch is
padded to: all hosts agree on it without a word.
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
from common_jax.ranges import Size

Batch = dict[str, np.ndarray]
TRIVIAL = 2  # tokens of a source of which only language code and end are left


@dataclasses.dataclass(frozen=True)
class BatchingConfig(Section):
    """The grouping and padding of sentences.

    Attributes:
      bucket: batches are padded to this many tokens, or twice, four times as many and so on: few
        lengths are compiled.
      half_steps: whether they may also be padded to one and a half times as many as each of these:
        less padding, and twice as much to compile.
      window: batches whose sentences are sorted by length among themselves, so that less of a batch
        is padding; 1 leaves the order of the epoch alone.
    """

    bucket: Size = 16
    half_steps: bool = False
    window: Size = 1

    def padded(self, longest: int) -> int:
        """The length that a batch is padded to whose longest sentence has so many tokens."""
        length = self.bucket * 2 ** max(0, math.ceil(math.log2(longest / self.bucket)))
        between = length * 3 // 4
        fits = length > self.bucket and longest <= between
        return between if self.half_steps and fits else length


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The examples of a stage with their features, ready to be cut into batches.

    Attributes:
      examples: sentences.
      features: a CLIP feature an example; None where the model takes none, or computes it.
      clip_tokens: what it computes it of, framed for the text tower; None elsewhere.
      pad: the id of padding in every tokenizer.
      room: tokens that the model has positions for after its prefix, which no batch is padded
        beyond.
      clip_room: the same of the text tower; None without `clip_tokens`.
    """

    examples: Examples
    features: Float32[np.ndarray, "B M"] | None
    clip_tokens: Sequence[np.ndarray] | None
    pad: int
    room: int
    clip_room: int | None = None

    def __len__(self) -> int:
        return len(self.examples)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: arrays have no hash
class TrainFeed:
    """Training batches of `Inputs`.

    Attributes:
      inputs: what is fed.
      noise: how tokens are dropped, where the stage drops any.
      batching: padding and grouping.
      batch: examples of a batch over all hosts.
      seed: of order and draws.
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
        """Whole batches in an epoch; the rest of it is left out."""
        return steps_per_epoch(len(self.inputs), self.batch)

    def batches(self, start: int) -> Iterator[Batch]:
        """From global step `start` on, without end."""
        rows = host_rows(self.batch, self.shard)
        for step in itertools.count(start):
            epoch, place = divmod(step, self.steps_per_epoch)
            chosen = self._order(epoch)[place * self.batch : (place + 1) * self.batch]
            yield collate(
                self.inputs, chosen, rows, self.batching, noise=self.noise,
                seed=self.seed, epoch=epoch,
            )  # fmt: skip

    def shapes(self, micro_batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a micro-batch over all hosts; other batches may be longer."""
        example = collate(
            self.inputs, np.arange(1), slice(0, 1), self.batching, noise=self.noise,
            seed=self.seed, epoch=0,
        )  # fmt: skip
        return {
            name: jax.ShapeDtypeStruct((micro_batch, *x.shape[1:]), x.dtype)
            for name, x in example.items()
        }

    def _order(self, epoch: int) -> Int64[np.ndarray, "B"]:
        order = epoch_permutation(self.seed, epoch, len(self.inputs))
        if self.batching.window == 1:
            return order
        return _sort_windows(self, epoch)


@functools.lru_cache(maxsize=2)
def _sort_windows(feed: TrainFeed, epoch: int) -> Int64[np.ndarray, "B"]:
    """Within a window of batches the sentences are sorted by length, and the batches shuffled."""
    order = epoch_permutation(feed.seed, epoch, len(feed.inputs))
    examples, batch = feed.inputs.examples, feed.batch
    pairs = zip(examples.source, examples.target, strict=True)
    lengths = np.array([len(a) + len(b) for a, b in pairs])
    generator = np.random.RandomState(feed.seed * 1_000_003 % 2**31 + epoch)
    whole = len(order) // batch
    batches = []
    for first in range(0, whole, feed.batching.window):
        window = order[first * batch : min(first + feed.batching.window, whole) * batch]
        ranked = window[np.argsort(lengths[window], kind="stable")].reshape(-1, batch)
        batches.extend(ranked[generator.permutation(len(ranked))])
    return np.concatenate(batches)


def collate(
    inputs: Inputs,
    chosen: Int64[np.ndarray, "B"],
    rows: slice,
    batching: BatchingConfig,
    *,
    noise: NoiseConfig,
    seed: int,
    epoch: int,
) -> Batch:
    """The rows of a batch that fall to this host.

    Args:
      inputs: all examples.
      chosen: the batch's examples, over all hosts.
      rows: this host's among them.
      batching: says what the batch is padded to.
      noise, seed, epoch: which tokens are dropped is drawn from seed, epoch and example.

    Returns:
      `source` [B, S] and `labels` [B, T] int32, and `features` [B, M] or `clip_tokens` [B, S].
    """
    examples = inputs.examples
    sources = [examples.source[i] for i in chosen]
    if examples.drops:
        sources = [
            _dropped(ids, example_generator(seed, epoch, int(i)), noise.mask_prob)
            for ids, i in zip(sources, chosen, strict=True)
        ]
    targets = [examples.target[i] for i in chosen]
    source, target = (_longest(x, batching, inputs.room) for x in (sources, targets))
    if source > TRIVIAL:
        source = target = max(source, target)  # fewer pairs of lengths to compile
    batch = {
        "source": pad(sources[rows], source, pad_id=inputs.pad),
        "labels": pad(targets[rows], target, pad_id=inputs.pad),
    }
    if inputs.features is not None:
        batch["features"] = inputs.features[chosen[rows]]
    if inputs.clip_tokens is not None:
        tokens = [inputs.clip_tokens[i] for i in chosen]
        length = _longest(tokens, batching, inputs.clip_room)
        batch["clip_tokens"] = pad(tokens[rows], length, pad_id=inputs.pad)
    return batch


def batch_shapes(
    batch: int, *, tokens: int, source: int | None = None, features: int = 0, clip_tokens: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `collate` gives.

    Args:
      batch: examples.
      tokens: that sentences are padded to.
      source: the same of what the encoder reads, where that differs.
      features: width of the features; 0 for none.
      clip_tokens: tokens for the text tower; 0 for none.
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
    """All examples once, the last batch filled up with its last example.

    Every batch also has `_mask` [B], 0 on what fills it up, and `_index` [B], the example. The same
    tokens are dropped in every pass.

    Args:
      by_length: whether long sources come first, so that batches hold sentences of like length.
    """
    order = np.arange(len(inputs))
    if by_length:
        lengths = np.array([len(ids) for ids in inputs.examples.source])
        order = np.argsort(-lengths, kind="stable")
    rows = host_rows(batch, shard)
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        real = np.arange(batch) < len(chosen)
        chosen = np.pad(chosen, (0, batch - len(chosen)), mode="edge")
        yield collate(inputs, chosen, rows, batching, noise=noise, seed=seed, epoch=0) | {
            "_mask": real[rows].astype(np.float32),
            "_index": chosen[rows].astype(np.int32),
        }


def _dropped(ids: np.ndarray, generator: np.random.Generator, mask_prob: float) -> np.ndarray:
    return drop_tokens(ids, generator.random(len(ids), dtype=np.float32), mask_prob)


def _longest(sentences: Sequence[np.ndarray], batching: BatchingConfig, room: int) -> int:
    longest = max(len(ids) for ids in sentences)
    return longest if longest <= TRIVIAL else min(batching.padded(longest), room)


def host_shard() -> tuple[int, int]:
    """(this host, number of hosts)."""
    return jax.process_index(), jax.process_count()
