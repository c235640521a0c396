"""Batches of sentences: their order, padding, resuming and evaluation."""

import dataclasses

import numpy as np
import pytest
from framed import CODES, EOS, PAD, SIZE, TOKENS, choose

from cliptrans_jax.data.examples import Examples, NoiseConfig
from cliptrans_jax.data.feed import (
    BatchingConfig,
    Inputs,
    TrainFeed,
    collate,
    evaluation_batches,
)
from cliptrans_jax.stages import Side

BATCH, CLIP_PAD, ROOM = 4, 0, 24


def inputs_of(examples, *, clip=False):
    numbers = np.arange(len(examples), dtype=np.float32)[:, None]
    tokens = [np.array([0, 30 + i, EOS], np.int32) for i in range(len(examples))]
    if clip:
        return Inputs(examples, None, tokens, PAD, ROOM, CLIP_PAD, 3)
    return Inputs(examples, numbers, None, PAD, ROOM)


def feed_of(examples, *, shard=(0, 1), batch=BATCH, bucket=8, window=1, mask_prob=1.0, **kinds):
    return TrainFeed(
        inputs_of(examples, **kinds),
        NoiseConfig(mask_prob=mask_prob),
        BatchingConfig(bucket=bucket, window=window),
        batch,
        7,
        shard,
    )


def take(feed, start, count):
    stream = feed.batches(start)
    return [next(stream) for _ in range(count)]


def numbers(batch):
    """The examples in a batch, identified by their words."""
    return (batch["labels"][:, 1] - 10).tolist()


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_rows_of_the_same_batches(window, clip, hosts):
    setting = {"window": window, "clip": clip, "mask_prob": 0.5}
    whole = take(feed_of(choose("caption"), **setting), 0, 12)
    parts = [
        take(feed_of(choose("caption"), shard=(host, hosts), **setting), 0, 12)
        for host in range(hosts)
    ]
    assert set(whole[0]) == {"source", "labels", "clip_tokens" if clip else "features"}
    for step, batch in enumerate(whole):
        for name, rows in batch.items():
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, rows)


@pytest.mark.parametrize("window", [1, 3])
def test_resuming_continues_with_the_same_batches(window):
    feed = feed_of(choose("caption"), window=window, mask_prob=0.5)
    whole, later = take(feed, 0, 14), take(feed_of(feed.inputs.examples, window=window,
                                                   mask_prob=0.5), 8, 6)  # fmt: skip
    for batch, again in zip(whole[8:], later, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])


@pytest.mark.parametrize("window", [1, 2, 5, 99])
def test_every_example_occurs_once_per_epoch(window):
    feed = feed_of(choose("translate"), window=window)
    assert feed.steps_per_epoch == SIZE // BATCH == 5
    epochs = [
        [i for batch in take(feed, epoch * 5, 5) for i in numbers(batch)] for epoch in range(4)
    ]
    for seen in epochs:
        assert len(set(seen)) == 5 * BATCH  # the last two are dropped
    assert len({tuple(seen) for seen in epochs}) == 4
    left_out = [set(range(SIZE)) - set(seen) for seen in epochs]
    assert len(set(map(frozenset, left_out))) > 1  # not the same two every time


def test_windows_group_sentences_of_similar_length():
    def batches(window):
        return take(feed_of(choose("caption"), window=window, bucket=1, mask_prob=0.0), 0, 5)

    plain, ranked = batches(1), batches(5)
    padding = [sum(int(np.sum(b["labels"] == PAD)) for b in found) for found in (plain, ranked)]
    assert padding[1] < padding[0] * 2 / 3
    # Batches hold the same examples, and the batches of a window are shuffled.
    seen = [sorted(i for batch in found for i in numbers(batch)) for found in (plain, ranked)]
    assert seen[0] == seen[1]
    lengths = [batch["labels"].shape[1] for batch in ranked]
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))


TOTALS = [len(a) + len(b) for a, b in zip(TOKENS["en"], TOKENS["de"], strict=True)]


@pytest.mark.parametrize("window", [2, 3])
def test_examples_are_sorted_by_length_within_a_window(window):
    """By the total number of source and target tokens."""
    plain, ranked = (
        [numbers(batch) for batch in take(feed_of(choose("translate"), window=one), 5, 5)]
        for one in (1, window)
    )
    for first in range(0, 5, window):
        before, after = (found[first : first + window] for found in (plain, ranked))
        assert sorted(np.ravel(before)) == sorted(np.ravel(after))
        batches = sorted([TOTALS[i] for i in batch] for batch in after)
        joined = np.ravel(batches).tolist()
        assert joined == sorted(joined)


def test_window_batches_are_reshuffled_by_epoch_and_seed():
    def places(seed, epoch):
        """Positions of the shortest batch, of the next, and so on."""
        feed = dataclasses.replace(feed_of(choose("translate"), window=5), seed=seed)
        totals = [[TOTALS[i] for i in numbers(batch)] for batch in take(feed, 5 * epoch, 5)]
        return tuple(sorted(range(5), key=lambda place: totals[place]))

    epochs, seeds = [places(7, i) for i in range(24)], [places(i, 2) for i in range(24)]
    for found in (epochs, seeds):
        assert len(set(found)) > 15  # out of 120 orders
        for rank in (0, 4):
            assert {order[rank] for order in found} == {*range(5)}
    assert places(7, 3) == places(7, 3)


def test_features_and_clip_tokens_stay_with_their_sentences():
    for clip, name in ((False, "features"), (True, "clip_tokens")):
        for batch in take(feed_of(choose("translate"), window=3, clip=clip), 0, 10):
            kept = batch[name][:, 1] - 30 if clip else batch[name][:, 0]
            assert kept.tolist() == numbers(batch)
            assert batch[name].shape == (BATCH, 3 if clip else 1)  # the tower's length
            assert batch["source"][:, 1].tolist() == batch["labels"][:, 1].tolist()


def test_text_tower_sentences_are_padded_with_its_own_id():
    examples = choose("translate")
    tokens = [np.full(1 + i % 3, 30, np.int32) for i in range(len(examples))]
    inputs = Inputs(examples, None, tokens, PAD, ROOM, CLIP_PAD, 3)
    rows = np.arange(BATCH)
    batch = collate(
        inputs, rows, slice(0, BATCH), BatchingConfig(), noise=NoiseConfig(), seed=0, epoch=0
    )
    ids = batch["clip_tokens"]
    assert [row[row != CLIP_PAD].tolist() for row in ids] == [tokens[i].tolist() for i in rows]
    assert PAD in batch["source"] and PAD not in ids


def test_lengths_are_few_and_within_the_limit():
    feed = feed_of(choose("translate"), batch=2, bucket=5)
    lengths = {batch["source"].shape[1] for batch in take(feed, 0, 60)}
    assert lengths <= {5, 10, 20}
    for batch in take(feed, 0, 60):
        assert batch["source"].shape == batch["labels"].shape
        longest = max(np.sum(batch[name] != PAD, axis=1).max() for name in ("source", "labels"))
        assert longest <= batch["source"].shape[1] < 2 * max(longest, 5)
    wide = feed_of(choose("translate"), bucket=19)  # for 21 tokens; doubled, that would be 38
    widths = {batch["source"].shape[1] for batch in take(wide, 0, 20)}
    assert max(widths) == ROOM and max(len(ids) for ids in TOKENS["en"]) > 19


def test_half_steps_reduce_padding():
    asked = [4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25]
    whole, half = BatchingConfig(bucket=5), BatchingConfig(bucket=4, half_steps=True)
    assert [whole.padded(n) for n in asked] == [5, 5, 10, 10, 10, 10, 20, 20, 20, 20, 40, 40]
    assert [half.padded(n) for n in asked] == [4, 6, 6, 8, 8, 12, 12, 16, 16, 24, 24, 32]


def test_empty_sources_have_two_tokens():
    for batch in take(feed_of(choose("caption")), 0, 5):
        assert batch["source"].tolist() == [[CODES["en"], EOS]] * BATCH
        assert batch["labels"].shape[1] in (8, 16, ROOM)


def test_shapes_match_the_batches():
    for clip in (False, True):
        feed = feed_of(choose("translate"), clip=clip)
        batch, shapes = take(feed, 0, 1)[0], feed.shapes(2)
        assert set(shapes) == set(batch)
        for name, shape in shapes.items():
            assert (shape.shape[0], shape.dtype) == (2, batch[name].dtype)
            assert len(shape.shape) == batch[name].ndim


def test_token_drops_are_independent_across_epochs_examples_and_seeds():
    """22 copies of one sentence of 16 words, in 4 epochs with 4 seeds."""
    ids = np.array([90, *range(10, 26), EOS], np.int32)
    rows, pairs = np.arange(SIZE, dtype=np.int32), (("en", "en"),) * SIZE
    examples = Examples([ids] * SIZE, [ids] * SIZE, Side.TEXT, rows, pairs, True)

    def kept(seed, epoch, chosen):
        batch = collate(
            inputs_of(examples), np.array(chosen), slice(0, len(chosen)), BatchingConfig(bucket=18),
            noise=NoiseConfig(mask_prob=0.3), seed=seed, epoch=epoch,
        )  # fmt: skip
        return [tuple(int(i in row) for i in range(10, 26)) for row in batch["source"]]

    found = [x for seed in range(4) for epoch in range(4) for x in kept(seed, epoch, range(SIZE))]
    assert len(set(found)) > 0.95 * len(found)
    places = np.mean(found, axis=0)
    np.testing.assert_allclose(places, 0.7, atol=0.1)
    together = np.corrcoef(np.array(found).T)[~np.eye(16, dtype=bool)]
    assert np.abs(together).max() < 0.25
    # Regardless of the batch and position of an example.
    assert kept(2, 3, [7, 4]) == [kept(2, 3, range(SIZE))[i] for i in (7, 4)]


def test_dropped_tokens_change_with_the_epoch():
    feed = feed_of(choose("caption"), mask_prob=0.5)

    def kept(epoch):
        rows = [
            (number, tuple(row[row != PAD]))
            for batch in take(feed, epoch * 5, 5)
            for number, row in zip(numbers(batch), batch["source"], strict=True)
        ]
        return dict(rows)

    first, again, later = kept(0), kept(0), kept(1)
    assert first == again
    both = [number for number in first if number in later and len(TOKENS["en"][number]) > 8]
    assert sum(first[number] != later[number] for number in both) > len(both) // 2
    for number, ids in first.items():
        whole = TOKENS["en"][number].tolist()
        assert (ids[0], ids[-1]) == (whole[0], EOS)
        assert set(ids) <= set(whole)


def evaluate(examples, *, shard=(0, 1), by_length=False, mask_prob=0.5, seed=7):
    return list(
        evaluation_batches(
            inputs_of(examples),
            batch=BATCH,
            batching=BatchingConfig(bucket=8),
            noise=NoiseConfig(mask_prob=mask_prob),
            seed=seed,
            shard=shard,
            by_length=by_length,
        )
    )


@pytest.mark.parametrize("by_length", [False, True])
def test_evaluation_covers_every_example_once_with_a_mask(by_length):
    batches = evaluate(choose("translate", train=False), by_length=by_length)
    assert len(batches) == 6
    seen = [
        int(index)
        for batch in batches
        for index, real in zip(batch["_index"], batch["_mask"], strict=True)
        if real
    ]
    assert sorted(seen) == list(range(SIZE))
    assert [batch["_mask"].sum() for batch in batches] == [4, 4, 4, 4, 4, 2]
    for batch in batches:
        assert batch["_index"].tolist() == numbers(batch)
        assert batch["features"][:, 0].tolist() == numbers(batch)
    lengths = [np.sum(row != PAD) for batch in batches for row in batch["source"]]
    if by_length:
        assert lengths == sorted(lengths, reverse=True)
    else:
        assert seen == list(range(SIZE))
    halves = [evaluate(choose("translate", train=False), shard=(h, 2), by_length=by_length)
              for h in range(2)]  # fmt: skip
    for batch, parts in zip(batches, zip(*halves, strict=True), strict=True):
        for name in batch:
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


def test_every_evaluation_drops_the_same_tokens():
    first, again = (evaluate(choose("caption", train=False)) for _ in range(2))
    for batch, other in zip(first, again, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
    other = evaluate(choose("caption", train=False), seed=8)
    assert any(
        one["source"].tolist() != two["source"].tolist()
        for one, two in zip(first, other, strict=True)
    )
    kept = sum(int(np.sum(batch["source"] != PAD)) for batch in first)
    assert kept < sum(len(ids) for ids in TOKENS["en"])


def test_another_seed_gives_another_order():
    feed = feed_of(choose("translate"), window=2)
    other = dataclasses.replace(feed, seed=8)
    orders = [[numbers(batch) for batch in take(one, 0, 5)] for one in (feed, other)]
    assert orders[0] != orders[1]
