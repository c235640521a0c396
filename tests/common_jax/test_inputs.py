"""A stateless order, equal on any number of hosts, with no bad example skipped silently."""

import dataclasses
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import psutil
import pytest
from same import assert_all_same

from common_jax import inputs
from common_jax.inputs import BadExample

SIZE, BATCH = 30, 8  # 3 full batches per epoch, with 6 examples left over


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Example i is the number i, unreadable if in `bad`; `reads` records the requests."""

    size: int = SIZE
    in_memory: bool = False
    bad: tuple[int, ...] = ()
    reads: list = dataclasses.field(default_factory=list)

    @property
    def arrays(self):
        return {"image": np.arange(self.size), "label": np.arange(self.size) % 3}

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads.append(index)
        if index in self.bad:
            raise BadExample(f"number {index}", "it is bad")
        return {"image": np.int64(index), "label": np.int64(index % 3)}


class OnDisk(Numbers):
    arrays = None


def add_noise(example, rng):
    return example | {"noise": rng.uniform(size=2)}


def take(batches, count):
    return list(itertools.islice(batches, count))


def train(source, **settings):
    settings = {"transform": None, "seed": 5, "batch": BATCH} | settings
    return inputs.train_batches(source, **settings)


def test_batches_follow_the_frozen_order():
    """From the frozen order 6 3 5 0 7 2 1 4, and the first of the next epoch."""
    batches = take(train(Numbers(size=8), seed=0, batch=3), 3)
    shown = [batch["image"].tolist() for batch in batches]
    assert shown[:2] == [[6, 3, 5], [0, 7, 2]]
    assert shown[2] == inputs.epoch_permutation(0, 1, 8)[:3].tolist()
    (batch,) = take(train(OnDisk(size=8), seed=0, batch=4, shard=(1, 2), start_step=1), 1)
    assert batch["image"].tolist() == [1, 4] and batch["label"].tolist() == [1, 1]
    for kind in (Numbers, OnDisk):
        copies = take(train(kind(size=8), seed=0, batch=4, repeats=3), 2)
        assert [batch["image"].tolist() for batch in copies] == [[6, 6, 6, 3], [3, 3, 5, 5]]
    assert inputs.host_rows(12, (2, 3)) == slice(8, 12)


def test_transform_draws_belong_to_the_example():
    (batch,) = take(train(OnDisk(), transform=add_noise, start_step=4, repeats=3), 1)
    order = inputs.epoch_permutation(5, 1, SIZE)  # seed 5; step 4 is the second of epoch 1
    for row in range(BATCH):
        index, copy = order[(BATCH + row) // 3], (BATCH + row) % 3
        rng = inputs.example_generator(5, 1, int(index), copy=copy)
        assert batch["image"][row] == index
        np.testing.assert_array_equal(batch["noise"][row], rng.uniform(size=2))


def test_epochs_visit_every_example_at_most_once():
    batches = take(train(Numbers()), 6)
    for epoch in (batches[:3], batches[3:]):
        seen = np.concatenate([batch["image"] for batch in epoch])
        assert len(seen) == 24 == len(np.unique(seen))
    assert (batches[0]["image"] != batches[3]["image"]).any()
    assert "_mask" not in batches[0]


def test_reading_one_by_one_matches_gathering():
    assert_all_same(take(train(OnDisk()), 5), take(train(Numbers()), 5))


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("kind", [Numbers, OnDisk])
def test_hosts_together_hold_the_batches_of_a_single_host(kind, hosts):
    transform = add_noise if kind is OnDisk else None
    alone = take(train(kind(), transform=transform), 4)
    shares = [
        take(train(kind(), transform=transform, shard=(host, hosts)), 4) for host in range(hosts)
    ]
    joined = [
        {name: np.concatenate([share[name] for share in step]) for name in step[0]}
        for step in zip(*shares, strict=True)
    ]
    assert_all_same(joined, alone)


@pytest.mark.parametrize("count", [0, 2])
def test_a_resumed_run_sees_the_same_pixels(count):
    whole = take(train(OnDisk(), transform=add_noise), 7)
    resumed = take(train(OnDisk(), transform=add_noise, start_step=4, workers=count), 3)
    assert_all_same(resumed, whole[4:])
    assert_all_same(take(train(Numbers(), start_step=4), 3), take(train(Numbers()), 7)[4:])


def test_resuming_does_not_read_earlier_examples():
    source = OnDisk()
    take(train(source, start_step=5), 1)
    assert len(source.reads) == BATCH


def test_random_draws_change_with_the_epoch():
    batches = take(train(OnDisk(), transform=add_noise), 6)
    noise = [
        {int(i): n[0] for b in epoch for i, n in zip(b["image"], b["noise"], strict=True)}
        for epoch in (batches[:3], batches[3:])
    ]
    both = noise[0].keys() & noise[1].keys()
    assert len(both) > 10
    assert all(noise[0][index] != noise[1][index] for index in both)


def test_transform_is_applied_to_in_memory_sources_too():
    whole = take(train(Numbers(), transform=add_noise), 4)
    assert_all_same(whole, take(train(OnDisk(), transform=add_noise), 4))
    double = lambda example: {"twice": 2 * example["image"]}  # noqa: E731
    for kind in (Numbers, OnDisk):
        batches = list(inputs.eval_batches(kind(size=5), transform=double, batch=4))
        assert [set(batch) for batch in batches] == [{"twice", "_mask"}] * 2
        np.testing.assert_array_equal(batches[0]["twice"], [0, 2, 4, 6])
        np.testing.assert_array_equal(batches[1]["twice"], [8, 0, 0, 0])  # padded like the rest


def test_any_host_can_resume_mid_epoch():
    whole = take(train(Numbers()), 12)
    for kind in (Numbers, OnDisk):
        mine = take(train(kind(), start_step=7, shard=(1, 4)), 5)
        rows = slice(2, 4)
        assert_all_same(mine, [{k: v[rows] for k, v in batch.items()} for batch in whole[7:]])


@pytest.mark.parametrize("count", [0, 1])
def test_bad_examples_are_replaced_and_reported_once(tmp_path, count, caplog):
    report = tmp_path / "run" / "bad_examples.jsonl"
    settings = {"bad_share": 2 / SIZE, "report_path": report, "workers": count}
    batches = take(train(OnDisk(bad=(4, 9)), **settings), 6)
    good = take(train(Numbers()), 6)
    replaced = 0
    for ours, clean in zip(batches, good, strict=True):
        numbers, bad = clean["image"], np.isin(clean["image"], (4, 9))
        np.testing.assert_array_equal(ours["image"][~bad], numbers[~bad])
        for row in np.flatnonzero(bad):
            following = np.roll(numbers, -row)
            assert ours["image"][row] == following[~np.isin(following, (4, 9))][0]
            replaced += 1
    assert replaced >= 2
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    found = sorted((line["name"], line["index"]) for line in lines)
    assert found == [("number 4", 4), ("number 9", 9)]
    assert "number 9: it is bad" in caplog.text
    take(train(OnDisk(bad=(4, 9)), **settings), 6)  # a resumed run adds nothing
    assert len(report.read_text().splitlines()) == 2


def test_replacements_are_the_same_on_two_hosts(tmp_path):
    settings = {"bad_share": 0.5, "transform": add_noise}
    bad = tuple(range(0, SIZE, 3))
    alone = take(train(OnDisk(bad=bad), **settings), 3)
    report = tmp_path / "bad_examples.jsonl"
    for host in range(2):
        mine = take(train(OnDisk(bad=bad), shard=(host, 2), report_path=report, **settings), 3)
        rows = slice(host * 4, host * 4 + 4)
        assert_all_same(mine, [{k: v[rows] for k, v in batch.items()} for batch in alone])
    assert {path.name for path in tmp_path.iterdir()} == {
        "bad_examples.jsonl",
        "bad_examples.1.jsonl",
    }


def test_too_many_bad_examples_stop_the_run_and_are_listed():
    with pytest.raises(ValueError, match=r"3 bad examples of 30.*bad_share=0.07.*number") as caught:
        take(train(OnDisk(bad=(4, 9, 11)), bad_share=0.07), 9)
    assert all(f"number {index}" in str(caught.value) for index in (4, 9, 11))


def test_batch_without_good_examples_stops_the_run():
    with pytest.raises(ValueError, match="leaves none for the batch of step 0"):
        take(train(OnDisk(size=4, bad=(0, 1, 2, 3)), batch=4, bad_share=1.0), 1)


def test_steps_per_epoch_error_names_the_keys():
    assert inputs.steps_per_epoch(30, 8) == 3
    with pytest.raises(ValueError, match=r"config\.optim\.batch=31 .* 30"):
        inputs.steps_per_epoch(30, 31)
    with pytest.raises(ValueError, match="must be from 1 to 30"):
        train(Numbers(), batch=31)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": (0, 3)}, "multiple of the 3 hosts"),
        ({"shard": (2, 2)}, "0 <= host < hosts"),
        ({"seed": -1}, "config.seed=-1"),
    ],
)
def test_invalid_settings_raise_at_the_call(settings, message):
    with pytest.raises(ValueError, match=message):
        train(Numbers(), **settings)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("kind", [Numbers, OnDisk])
def test_evaluation_pads_the_last_batch_on_every_host(kind, hosts):
    source = kind(size=17)
    shares = [
        list(
            inputs.eval_batches(
                source, transform=None, batch=8, shard=(host, hosts), workers=int(host == 1)
            )
        )
        for host in range(hosts)
    ]
    assert {len(share) for share in shares} == {3}
    images = np.concatenate(
        [batch["image"] for step in zip(*shares, strict=True) for batch in step]
    )
    mask = np.concatenate([batch["_mask"] for step in zip(*shares, strict=True) for batch in step])
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, np.arange(24) < 17)
    np.testing.assert_array_equal(images[:17], np.arange(17))
    np.testing.assert_array_equal(images[17:], 0)


@pytest.mark.parametrize("kind", [Numbers, OnDisk])
def test_evaluation_transforms_each_example(kind):
    def twice(example):
        return {"twice": 2 * example["image"], "label": example["label"]}

    batches = list(inputs.eval_batches(kind(size=5), transform=twice, batch=4))
    assert [batch["twice"].tolist() for batch in batches] == [[0, 2, 4, 6], [8, 0, 0, 0]]
    assert [batch["label"].tolist() for batch in batches] == [[0, 1, 2, 0], [1, 0, 0, 0]]


def test_evaluation_masks_bad_examples_up_to_bad_share(tmp_path):
    report = tmp_path / "bad.jsonl"
    source = OnDisk(size=10, bad=(0, 6))
    batches = list(
        inputs.eval_batches(
            source, transform=lambda e: e, batch=4, bad_share=0.2, report_path=report
        )
    )
    mask = np.concatenate([batch["_mask"] for batch in batches])
    np.testing.assert_array_equal(np.flatnonzero(mask == 0), [0, 6, 10, 11])
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(line["name"], line["index"]) for line in lines] == [("number 0", 0), ("number 6", 6)]
    with pytest.raises(ValueError, match=r"number 0.*raise config\.data\.bad_share"):
        list(inputs.eval_batches(source, transform=None, batch=4))
    settings = {"transform": None, "batch": 4, "way_out": "all of them are needed"}
    with pytest.raises(ValueError, match=r"1 bad examples of 10: .*; all of them are needed$"):
        list(inputs.eval_batches(source, **settings))
    with pytest.raises(ValueError, match="leaves none to evaluate"):
        list(
            inputs.eval_batches(OnDisk(size=2, bad=(0, 1)), transform=None, batch=2, bad_share=1.0)
        )


@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_evaluation_bad_share_is_relative_to_the_whole_set(hosts):
    source, other = OnDisk(size=18, bad=(0, 8)), {"transform": None, "batch": 8}
    for host in range(hosts):
        shard = (host, hosts)
        assert len(list(inputs.eval_batches(source, **other, bad_share=0.12, shard=shard))) == 3
    with pytest.raises(ValueError, match=r"2 bad examples of 18, more than .*bad_share=0.1 allows"):
        list(inputs.eval_batches(source, **other, bad_share=0.1, shard=(0, hosts)))


def test_host_does_not_count_the_bad_examples_of_another(tmp_path):
    """The last host pads its batch in the shapes of a good example, which it looks for."""
    source, report = OnDisk(size=9, bad=(0, 1)), tmp_path / "bad.jsonl"
    other = {"transform": None, "batch": 8, "report_path": report, "shard": (3, 4)}
    assert len(list(inputs.eval_batches(source, **other))) == 2
    assert list(tmp_path.iterdir()) == []


class Pictures(Numbers):
    @property
    def arrays(self):
        return {"image": np.arange(1, 1 + 4 * self.size).reshape(self.size, 2, 2).astype(np.uint8)}

    def __getitem__(self, index):
        return {"image": self.arrays["image"][index]}


class PicturesOnDisk(Pictures):
    arrays = None

    def __getitem__(self, index):
        return Pictures(size=self.size)[index]


@pytest.mark.parametrize("kind", [Pictures, PicturesOnDisk])
def test_padding_pictures_are_zeros(kind):
    (batch,) = inputs.eval_batches(kind(size=2), transform=None, batch=3)
    assert batch["image"].dtype == np.uint8
    wanted = [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[0, 0], [0, 0]]]
    np.testing.assert_array_equal(batch["image"], wanted)
    np.testing.assert_array_equal(batch["_mask"], [1, 1, 0])


def test_bad_share_may_be_reached_but_not_exceeded():
    for bad, share in (((4,), 1 / SIZE), ((4, 9, 11), 0.1)):
        take(train(OnDisk(bad=bad), bad_share=share), 9)
        with pytest.raises(ValueError, match=f"{len(bad)} bad examples of 30"):
            take(train(OnDisk(bad=bad), bad_share=share - 1e-6), 9)


class Rows(OnDisk):
    """Arrays of several dtypes, and the id of the process that read them."""

    def __getitem__(self, index):
        small = super().__getitem__(index)
        row = np.random.default_rng(index).normal(size=(5, 7))
        return small | {
            "row": row.T,
            "bytes": row.view(np.uint8)[::2],
            "process": np.int64(os.getpid()),
        }


class Failing(OnDisk):
    def __getitem__(self, index):
        if index == 11:
            raise KeyError("eleven")
        return super().__getitem__(index)


def alive(pids):
    return {pid for pid in pids if psutil.pid_exists(pid)}


def notes(caught):
    return "".join(caught.value.__notes__)


def test_worker_count_does_not_change_batches():
    settings = {"transform": add_noise, "repeats": 3, "bad_share": 0.5}
    runs = [take(train(Rows(bad=(4,)), workers=count, **settings), 8) for count in (0, 3)]
    processes = [{pid for b in batches for pid in b.pop("process").tolist()} for batches in runs]
    assert_all_same(*runs)
    assert processes[0] == {os.getpid()}  # it also reads the replacement for a bad example
    assert [len(pids - processes[0]) for pids in processes] == [0, 3]
    gc.collect()
    assert alive(set.union(*processes)) == {os.getpid()}


def test_worker_exception_is_reraised_in_the_parent():
    with pytest.raises(KeyError, match="eleven") as caught:
        take(train(Failing(), workers=1), 9)
    assert "in __getitem__" in "".join(traceback.format_exception(caught.value))
    assert "Read in config.data.workers=1 processes" in notes(caught)
    with pytest.raises(KeyError, match="eleven"):
        take(train(Failing()), 9)


def test_killed_worker_stops_the_run():
    batches = train(Rows(), workers=2)
    pids = set(next(batches)["process"].tolist())
    os.kill(min(pids), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="terminated unexpectedly") as caught:
        take(batches, 99)
    assert "lower config.data.workers" in notes(caught)
    assert not alive(pids)


def test_workers_end_with_their_parent():
    found = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, env=found)
    pids = json.loads(parent.stdout.readline())
    assert len(alive(pids)) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pids)


def test_unpicklable_transform_error_suggests_zero_workers():
    lock = threading.Lock()
    with pytest.raises(TypeError, match="pickle") as caught:
        next(train(OnDisk(), workers=1, transform=lambda example, rng: lock))
    assert "set config.data.workers=0" in notes(caught)


def test_examples_too_large_for_a_slot_still_arrive():
    batches = [next(train(Growing(), batch=1, workers=count, start_step=7)) for count in (0, 1)]
    assert_all_same(batches[:1], batches[1:])


class Growing(OnDisk):
    """Ever larger examples: those after the first do not fit its slot."""

    def __getitem__(self, index):
        return {"image": np.arange(1 + index)}


@pytest.mark.parametrize("kind", [Numbers, OnDisk])
def test_repeats_are_consecutive_and_drawn_separately(kind):
    transform = add_noise if kind is OnDisk else None
    settings = {"transform": transform, "repeats": 3}
    batches = take(train(kind(), **settings), 6)
    for epoch in range(2):
        order = np.concatenate([batch["image"] for batch in batches[3 * epoch : 3 * epoch + 3]])
        wanted = np.repeat(inputs.epoch_permutation(5, epoch, SIZE), 3)[:24]
        np.testing.assert_array_equal(order, wanted)
    assert_all_same(take(train(kind(), start_step=4, **settings), 2), batches[4:])
    host = take(train(kind(), shard=(1, 2), **settings), 6)
    assert_all_same(host, [{name: rows[4:] for name, rows in batch.items()} for batch in batches])
    if transform:
        noise = np.concatenate([batch["noise"][:, 0] for batch in batches])
        assert len(np.unique(noise)) == 48
        alone = take(train(kind(), transform=transform), 1)[0]
        assert alone["noise"][0, 0] == batches[0]["noise"][0, 0]  # the first copy is unchanged


if __name__ == "__main__":  # reads until it is killed
    stream = train(Rows(), workers=2)
    print(json.dumps(sorted(set(next(stream)["process"].tolist()))), flush=True)
    time.sleep(99)
