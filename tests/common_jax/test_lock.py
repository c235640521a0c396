"""The lock of a workdir: acquisition, refusal, and locks of dead processes."""

import dataclasses
import errno
import json
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest
from together import together

from common_jax import hosts
from common_jax.workdir import Locked, LockLost, hold, lock, require

NAME = "run.lock"


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def left_by(workdir, *, age: float = 0.0, **changes) -> lock.Holder:
    """A lock held by this test's parent process, unless `changes` says otherwise, last touched
    `age` seconds ago."""
    parent = os.getppid()
    holder = dataclasses.replace(
        lock.Holder.this(),
        **{"pid": parent, "started": lock._start_of(parent), "since": "yesterday"} | changes,
    )
    path = workdir / NAME
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - age, time.time() - age))
    return holder


def ended() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_lock_is_held_and_released(tmp_path):
    workdir = tmp_path / "runs" / "a"
    with hold(workdir):
        held = json.loads((workdir / NAME).read_text())
        assert held["pid"] == os.getpid()
        with hold(workdir):  # the loop's lock, inside the command's
            require(workdir)
        assert (workdir / NAME).exists()
    assert not (tmp_path / "runs").exists()  # a refused start leaves no folder


def test_files_written_under_the_lock_are_kept(tmp_path):
    with hold(tmp_path / "a"):
        (tmp_path / "a" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.json"]


def test_lock_is_released_after_an_error(workdir):
    with pytest.raises(ZeroDivisionError), hold(workdir):
        raise ZeroDivisionError
    assert not (workdir / NAME).exists()


@pytest.mark.parametrize("age", [0.0, 1e6])
def test_running_holder_is_named_in_the_error(workdir, age):
    """However long ago it touched the lock, since it may be suspended by Ctrl-Z."""
    left_by(workdir, age=age, host="node7")
    before = (workdir / NAME).read_bytes()
    message = rf"run is in use by process {os.getppid()} on node7 since yesterday: .*--workdir"
    with pytest.raises(Locked, match=message), hold(workdir):
        pass
    assert [path.name for path in workdir.iterdir()] == [NAME]
    assert (workdir / NAME).read_bytes() == before


@pytest.mark.parametrize("changes", [{"pid": None}, {"started": 1}])
def test_lock_of_a_dead_process_is_taken_over_at_once(workdir, caplog, changes):
    """Even if another process has its id by now."""
    left_by(workdir, **{"pid": ended()} if "pid" in changes else changes)
    with hold(workdir):
        assert json.loads((workdir / NAME).read_text())["pid"] == os.getpid()
    assert "taking over the lock of process" in caplog.text


def test_zombie_process_counts_as_dead(workdir):
    process = subprocess.Popen([sys.executable, "-c", ""])
    holder = left_by(workdir, pid=process.pid, started=lock._start_of(process.pid))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert holder.alive is False
    process.wait()


def test_stale_lock_of_another_machine_is_taken_over(workdir, caplog):
    left_by(workdir, age=91, machine="another", host="node7")
    with hold(workdir):
        pass
    assert "on node7" in caplog.text


def test_fresh_lock_of_another_machine_is_watched(workdir, monkeypatch, caplog):
    monkeypatch.setattr(lock, "STALE", 0.3)
    monkeypatch.setattr(lock, "LOOK", 0.02)
    left_by(workdir, machine="another")
    began = time.monotonic()
    with hold(workdir):
        assert time.monotonic() - began >= 0.25
    assert "to see whether it still runs" in caplog.text


def test_lock_touched_by_another_machine_is_in_use(workdir, monkeypatch):
    monkeypatch.setattr(lock, "LOOK", 0.05)
    left_by(workdir, age=5, machine="another")
    touch = threading.Timer(0.1, os.utime, (workdir / NAME,))
    touch.start()
    with pytest.raises(Locked), hold(workdir):
        pass
    touch.join()


def test_empty_lock_belongs_to_a_starting_process(workdir, monkeypatch, caplog):
    monkeypatch.setattr(lock, "STALE", 0.2)
    monkeypatch.setattr(lock, "LOOK", 0.02)
    (workdir / NAME).touch()
    with hold(workdir):
        require(workdir)
        assert json.loads((workdir / NAME).read_text())["pid"] == os.getpid()
    assert "last used by a process that has just started; waiting up to" in caplog.text


@pytest.mark.parametrize("readable", [True, False])
def test_last_touch_in_the_future_does_not_block_the_folder(workdir, readable, monkeypatch, caplog):
    monkeypatch.setattr(lock, "STALE", 0.3)
    monkeypatch.setattr(lock, "LOOK", 0.02)
    left_by(workdir, age=-3600, machine="another")
    if not readable:
        (workdir / NAME).write_text("")
        os.utime(workdir / NAME, (time.time() + 3600,) * 2)
    began = time.monotonic()
    with hold(workdir):
        assert 0.25 <= time.monotonic() - began < 60
    assert "waiting up to 0 s" in caplog.text and "(last sign of life 0 s ago)" in caplog.text


@pytest.mark.parametrize("pid", ["7", 1 << 70, 0, -1, None])
def test_stale_lock_naming_no_process_is_taken_over(workdir, pid):
    left_by(workdir, age=lock.STALE + 10, pid=pid)
    with hold(workdir):
        assert json.loads((workdir / NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_many_simultaneous_starts_gets_the_lock(workdir, stale):
    if stale:
        left_by(workdir, pid=ended())
    start, got, refused = threading.Barrier(8), [], []

    def contend():
        start.wait()
        try:
            got.append(lock._Lock.of(str(workdir)))
        except Locked:
            refused.append(1)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].require()
    got[0].release()
    assert list(workdir.iterdir()) == []


def test_lost_lock_raises(workdir):
    with hold(workdir):
        left_by(workdir, host="node7")
        with pytest.raises(LockLost, match=r"was taken over by process .* on node7"):
            require(workdir)
    assert (workdir / NAME).exists()  # it belongs to the other process
    (workdir / NAME).unlink()
    with hold(workdir):
        (workdir / NAME).unlink()
        with pytest.raises(LockLost, match="was deleted, or its folder was"):
            require(workdir)


def test_held_lock_is_touched_regularly(workdir, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with hold(workdir):
        os.utime(workdir / NAME, (0, 0))
        deadline = time.monotonic() + 5
        while (workdir / NAME).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_require_fails_if_no_lock_can_be_written(workdir, monkeypatch, number):
    def fail(self, content):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock._Lock, "_create", fail)
    with hold(workdir):  # as a finished run may
        with pytest.raises(OSError, match=r"no lock can be written.*run\.lock") as error:
            require(workdir)
        assert error.value.errno == number


def test_lock_that_does_not_fit_on_the_disk_is_removed(workdir, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    def full(path, mode):
        path.touch()
        return open("/dev/full", "w")

    monkeypatch.setattr(lock, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        lock._Lock(workdir / NAME)._create("{}")
    assert list(workdir.iterdir()) == []


def test_bucket_has_no_lock_and_warns_once(caplog):
    with caplog.at_level(logging.WARNING), hold("gs://bucket/run"), hold("gs://bucket/run/meta"):
        require("gs://bucket/run/meta")
    assert caplog.text.count("has no locks") == 1


def test_slow_takeover_leaves_the_lock_of_a_faster_one_alone(workdir):
    left_by(workdir, pid=ended())
    stale, touched = lock._read(workdir / lock.NAME), (workdir / lock.NAME).stat().st_mtime
    fast = lock._Lock.of(str(workdir))
    slow = lock._Lock(workdir / lock.NAME)
    slow._take_over(stale, touched, age=0.0)  # as if it had read the stale lock before
    fast.require()
    fast.release()
    assert list(workdir.iterdir()) == []


def test_killed_takeover_does_not_keep_a_stale_lock_forever(workdir, monkeypatch):
    left_by(workdir, pid=ended())
    stale, touched = lock._read(workdir / lock.NAME), (workdir / lock.NAME).stat().st_mtime
    monkeypatch.setattr(pathlib.Path, "unlink", lambda *_, **__: None)
    slow = lock._Lock(workdir / lock.NAME)
    slow._take_over(stale, touched, age=0.0)  # killed before it removed anything
    monkeypatch.undo()
    (claim,) = workdir.glob(".*.stale")
    os.utime(claim, (0, 0))
    found = lock._Lock.of(str(workdir))
    found.require()
    found.release()
    assert list(workdir.iterdir()) == []


@pytest.fixture
def own_locks(monkeypatch):
    """Gives each thread its own locks, as each process has."""

    class Own(threading.local):
        def __init__(self):
            self.locks = {}

        def __iter__(self):
            return iter(self.locks)

        def __setitem__(self, path, held):
            self.locks[path] = held

        def pop(self, path, default):
            return self.locks.pop(path, default)

    monkeypatch.setattr(lock, "_locks", Own())
    monkeypatch.setattr(lock, "LOOK", 0.0)


def entering(workdir):
    """Holds a workdir and a run below it; returns whether the lock was there."""

    def enter():
        with hold(workdir), hold(workdir / "run"):
            there = (workdir / NAME).exists()
            hosts.barrier("all have looked")
            return there

    return enter


def test_workdir_that_not_all_processes_share_is_refused(own_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SIGHT", 0.0)
    first, second = tmp_path / "first", tmp_path / "second"
    errors = together(monkeypatch, entering(first), entering(second))
    assert [type(error) for error in errors] == [hosts.Disagreement] * 2
    (text,) = {str(error) for error in errors}
    assert text.startswith(f"--workdir='{second}': process 1, on ")
    assert f"process 0, on {lock.socket.gethostname()}, has written to '{first}'" in text
    assert "give a --workdir there" in text
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_lock_of_another_run_is_not_that_of_this_one(own_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SIGHT", 0.0)
    (tmp_path / "second").mkdir()
    left_by(tmp_path / "second")
    views = (entering(tmp_path / name) for name in ("first", "second"))
    errors = together(monkeypatch, *views)
    assert [type(error) for error in errors] == [hosts.Disagreement] * 2


def test_slow_storage_is_waited_for(own_locks, tmp_path, monkeypatch, caplog):
    """The third process sees the lock at its third look."""
    looks, read = threading.local(), lock._read

    def slow(path):
        looks.count = getattr(looks, "count", 0) + 1
        return read(path) if lock.jax.process_index() < 2 or looks.count > 2 else None

    monkeypatch.setattr(lock, "_read", slow)
    assert together(monkeypatch, *[entering(tmp_path / "run")] * 3) == [True] * 3
    assert caplog.text.count("cannot be seen here") == 1
    assert not (tmp_path / "run").exists()


def test_lock_that_cannot_be_written_is_not_looked_for(own_locks, tmp_path, monkeypatch):
    """A finished run may be on a read-only disk."""

    def fail(self):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock._Lock, "_take", fail)
    assert together(monkeypatch, *[entering(tmp_path)] * 2) == [False, False]
