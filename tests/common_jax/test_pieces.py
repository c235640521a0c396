"""The shared-memory ring returns its contents unchanged, and is always removed."""

import pickle
import secrets
import time
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pytest
from same import assert_all_same

from common_jax.inputs import BadExample, train_batches
from common_jax.inputs.pieces import Receiver, RingPiece, Sender
from common_jax.inputs.workers import read_in_order


def piece(number, *, size=5, count=3):
    """Examples with an array, a scalar and a string each."""
    rng = np.random.default_rng(number)
    return [
        {
            "row": rng.normal(size=(size, 2)).T,
            "label": np.int32(rng.integers(100)),
            "text": np.array(f"{number}:{row}", "U9"),
        }
        for row in range(count)
    ]


def through_pickle(sent):
    return pickle.loads(pickle.dumps(sent))


@pytest.fixture
def names():
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def receive(names):
    receiver = Receiver(names, 2)
    yield receiver
    receiver.close()


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_slots_are_reused_once_their_piece_is_received(names, receive, behind):
    """However far the receiver is behind, as long as no more pieces are in flight than there are
    slots."""
    send, under_way = Sender(names, slots=behind + 2), []
    for number in range(20):
        under_way.append((number, through_pickle(send(piece(number)))))
        assert isinstance(under_way[-1][1], RingPiece)
        if number >= behind:
            number, sent = under_way.pop(0)
            assert_all_same(receive(sent), piece(number))


def test_full_ring_neither_overwrites_nor_blocks(names, receive):
    send = Sender(names, slots=3)
    sent = [through_pickle(send(piece(number))) for number in range(8)]
    assert [isinstance(each, RingPiece) for each in sent] == [True] * 3 + [False] * 5
    received = [list(receive(each)) for each in sent]
    for number, outcomes in enumerate(received):
        assert_all_same(outcomes, piece(number))
    assert isinstance(send(piece(8)), RingPiece)  # its slots are free again


def test_received_piece_is_not_overwritten(names, receive):
    send = Sender(names, slots=2)
    first = list(receive(send(piece(0))))
    for number in range(1, 6):
        list(receive(send(piece(number))))
    assert_all_same(first, piece(0))


@pytest.mark.parametrize(
    "outcomes",
    [
        piece(1, size=6),  # larger than a slot
        piece(1) + piece(2, size=4),
        [BadExample("file", "broken"), *piece(1)],
        [*piece(1), {"row": np.zeros(2)}],
        [{"row": np.array([None, "object"])}],
        [{}, {}],
    ],
    ids=["large", "uneven", "bad", "names", "objects", "empty"],
)
def test_pieces_that_fit_no_slot_are_sent_directly(names, receive, outcomes):
    send = Sender(names, slots=4)
    list(receive(send(piece(0))))
    sent = through_pickle(send(outcomes))
    assert not isinstance(sent, RingPiece)
    if isinstance(outcomes[0], BadExample):
        bad, *others = receive(sent)
        assert str(bad) == "file: broken"
        assert_all_same(others, outcomes[1:])
    else:
        assert_all_same(receive(sent), outcomes)
    assert_all_same(receive(send(piece(3, count=2))), piece(3, count=2))  # a smaller one fits


def test_pieces_of_an_ended_sender_are_received(names, receive):
    send = Sender(names, slots=3)
    sent = [through_pickle(send(piece(number))) for number in range(2)]
    del send
    for number, each in enumerate(sent):
        assert_all_same(receive(each), piece(number))


def test_no_shared_memory_is_left_behind(names, receive):
    senders = [Sender(names, slots=2) for _ in range(2)]
    rings = [send(piece(0)).ring for send in senders]  # nothing is ever received from the second
    assert len(set(rings)) == 2
    assert_all_same(receive(senders[0](piece(1))), piece(1))
    senders.clear()
    receive.close()
    for ring in rings:
        with pytest.raises(FileNotFoundError):
            SharedMemory(ring)


def read_slowly(position):
    """The first items needed arrive last."""
    if position == 0:
        time.sleep(2)
    if position == 12:
        raise KeyError("twelve")
    return {"image": np.full(3, position)}


@pytest.mark.parametrize("count", [12, 99])
def test_workers_may_end_before_their_pieces_are_received(count):
    """At the end, or by an error, which is raised in its turn, after everything before it."""
    stream, found = read_in_order(read_slowly, range(count), batch=8, workers=2), []
    try:
        found += stream
    except KeyError:
        assert count == 99
    assert [int(outcome["image"][0]) for outcome in found] == list(range(12))


class Wide:
    """A source on disk whose batches are never larger than what waits in a queue."""

    arrays = None

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return {"image": np.full((8, 8), index)}


def test_all_worker_pieces_find_a_slot(monkeypatch):
    """Also when the workers are as far ahead as they may be."""
    received, receive = [], Receiver.__call__

    def watched(self, sent):
        received.append(type(sent))
        return receive(self, sent)

    monkeypatch.setattr(Receiver, "__call__", watched)
    batches = train_batches(Wide(), transform=None, seed=0, batch=6, workers=2)
    for number in range(24):
        next(batches)
        if number in (0, 9, 17):
            time.sleep(0.5)  # the workers fill every free slot
    batches.close()
    assert set(received) == {RingPiece}
