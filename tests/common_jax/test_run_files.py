"""A run's own files after damage or an edit: errors name the file."""

import errno
import json
import os
import subprocess
import sys

import pytest
import tiny
from etils import epath

from common_jax.config import unfreeze
from common_jax.metrics import Recorder, read_metrics
from common_jax.workdir import (
    describe_error,
    freeze_stored,
    leftovers,
    new_folder,
    read_json,
    unfinished,
    write_json,
    write_result,
)
from m2mkd_jax.config import Config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"steps": 3', r"is not JSON \(Expecting .*line 1 column 12"),
        (b"", "is not JSON"),
        (b"\xff\xfe{}", r"is not UTF-8 \(invalid start byte at byte 0\)"),
        (b"[]", "must hold a JSON object, not a list"),
        (b"[" * 100_000, "is JSON that is nested too deep"),
        (b'{"steps": 3, "steps": 4}', "has the key 'steps' twice"),
        (b'{"loss": 0.5}', "lacks 'steps'"),
        (b'{"steps": "3", "loss": 1}', "has 'steps': '3', which is not of type int"),
        (b'{"steps": true, "loss": 1}', "has 'steps': True, which is not of type int"),
        (b'{"steps": 3, "loss": [1]}', r"has 'loss': \[1\], which is not of type int . float"),
    ],
)
def test_invalid_json_file_is_reported(tmp_path, content, message):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"result\.json {message}.*Restore it, or delete it"):
        read_json(path, {"steps": int, "loss": int | float})


def test_json_file_may_have_a_bom_nan_and_null(tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(b'\xef\xbb\xbf{"steps": 3, "loss": NaN, "more": null}')
    found = read_json(path, {"steps": int, "loss": int | float})
    assert found["steps"] == 3 and found["loss"] != found["loss"] and found["more"] is None


@pytest.mark.parametrize("value", ['"x"', "null", "true", "{}", '["x"]', "[[null]]"])
def test_metrics_must_be_numbers_or_lists_of_numbers(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "a": [0.5, [1]]}}\n{{"step": 2, "a": {value}}}\n')
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl, line 2: has 'a': .* not a number.*fix or"
    ):
        read_metrics(path)


LINES = b'{"step": 2, "a": 1.50}\n{"step": 4}\n{"step": 6}\n'


def record(workdir, step):
    Recorder(workdir, step=step).close()
    path = workdir / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def test_later_lines_are_dropped_and_others_left_unchanged(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(LINES + b'{"step": 6, "tr')
    assert record(tmp_path, 4) == b'{"step": 2, "a": 1.50}\n{"step": 4}\n'


def test_later_timing_lines_are_dropped_too(tmp_path):
    (tmp_path / "timing.jsonl").write_bytes(LINES)
    record(tmp_path, 5)
    assert (tmp_path / "timing.jsonl").read_bytes() == b'{"step": 2, "a": 1.50}\n{"step": 4}\n'


@pytest.mark.parametrize("broken", [b'{"step": "x"}\n', b"[]\n", b'{"st\n', b"\xff\n"])
def test_broken_line_stops_the_run_before_anything_is_rewritten(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES + broken)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 4: .*; fix or delete this line"):
        record(tmp_path, 4)
    assert path.read_bytes() == LINES + broken


@pytest.mark.parametrize("kind", ["nac2", 3, None, ["vmoe"], {"a": 1}])
def test_stored_config_of_an_unknown_kind_is_refused(tmp_path, kind):
    stored = json.loads(json.dumps(unfreeze(tiny.tiny_config("distill")).to_dict()))
    stored["model"]["kind"] = kind
    with pytest.raises(ValueError, match=r"config of runs/a is not valid in this version: .*kind"):
        freeze_stored(Config, stored, "runs/a")


def test_new_folder_appears_only_when_it_is_whole(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as part:
        (part / "model.safetensors").write_bytes(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as part:
        (part / "README.md").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "README.md").read_text() == "whole"


@pytest.fixture
def dead():
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_files_of_killed_writers_are_removed_by_the_next_write(tmp_path, dead, monkeypatch):
    monkeypatch.setattr(leftovers, "machine", lambda: "elsewhere")
    old, fresh = (leftovers.temporary_beside(tmp_path / name) for name in "ab")
    monkeypatch.undo()
    own = leftovers.temporary_beside(tmp_path / "c")
    killed = tmp_path / own.name.replace(f".{os.getpid()}.", f".{dead}.").replace(".c.", ".d.")
    other = tmp_path / ".e.1.tmp"  # not one of these names
    for path in (old, fresh, own, killed, other):
        path.touch()
    (folder := tmp_path / killed.name.replace(".d.", ".f.")).mkdir()
    (folder / "weights").touch()
    os.utime(old, (0, 0))
    write_json(tmp_path / "result.json", {})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {fresh.name, own.name, other.name, "result.json"}


def test_full_disk_is_reported_with_the_file_and_a_way_out(tmp_path, monkeypatch):
    path = tmp_path / "result.json"

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))  # the temporary name

    monkeypatch.setattr(type(epath.Path(path)), "write_bytes", full)
    with pytest.raises(OSError) as raised:
        write_json(path, {})
    assert describe_error(raised.value) == (
        f"[Errno 28] No space left on device: '{path}'. Make room, and start the same command again"
    )
    assert describe_error(ValueError("config.seed=-1")) == "config.seed=-1"


def test_runs_without_all_their_files_are_unfinished(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").touch()
    runs = [("a", 1), ("b", 2)]
    assert unfinished(tmp_path, runs) == [("b", 2)]
    scored = {1: ("result.json", "scores.json"), 2: ()}
    assert unfinished(tmp_path, runs, scored.get) == [("a", 1)]


def test_result_holds_phase_steps_and_metrics(tmp_path):
    result = write_result(tmp_path, phase="distill", steps=3, skipped=0, metrics={"x/y": 1.0})
    assert result == {"phase": "distill", "steps": 3, "skipped": 0, "x/y": 1.0}
    assert read_json(tmp_path / "result.json") == result
