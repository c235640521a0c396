"""A run's metrics: lines, TensorBoard events, and nothing partial on a full disk."""

import contextlib
import json
import resource
import struct

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tensorboardX.proto.event_pb2 import Event, SessionLog

from common_jax import metrics
from common_jax.metrics import Recorder


def text_of(workdir, name="metrics.jsonl"):
    return (workdir / name).read_text()


def events_of(workdir):
    """The events in the only event file, after the first, which states the format version."""
    (path,) = workdir.glob("events*")
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))  # after the length's checksum
        content = content[12 + length + 4 :]
    return found[1:]


@pytest.fixture
def recorder(tmp_path):
    made = Recorder(tmp_path, step=4)
    yield made
    made.close()


def test_metrics_line_has_step_epoch_and_plain_numbers(recorder, tmp_path):
    values = {"train/loss": np.float32(0.1), "train/skipped": 3, "train/load": jnp.array([[1, 2]])}
    recorder.write(6, 2 / 3, values)
    recorder.write(7, 1.0, {"test/accuracy": float("nan")})
    assert text_of(tmp_path) == (
        '{"step": 6, "epoch": 0.666667, "train/loss": 0.10000000149011612, "train/skipped": 3.0, '
        '"train/load": [[1.0, 2.0]]}\n{"step": 7, "epoch": 1.0, "test/accuracy": NaN}\n'
    )


def test_timing_has_its_own_file(recorder, tmp_path):
    recorder.write_timing(6, examples_per_second=128.0, milliseconds=500.0)
    line = {"step": 6, "examples_per_second": 128.0, "milliseconds_per_step": 500.0}
    assert json.loads(text_of(tmp_path, "timing.jsonl")) == line
    assert not (tmp_path / "metrics.jsonl").exists()
    values = {value.tag: value.simple_value for value in events_of(tmp_path)[-1].summary.value}
    assert values == {"timing/examples_per_second": 128, "timing/milliseconds_per_step": 500}


def test_events_hold_scalars_and_mark_the_restart(recorder, tmp_path):
    recorder.write(6, 1.5, {"train/loss": 0.25, "train/load": [1.0, 2.0], "test/x": 3})
    start, line = events_of(tmp_path)
    # TensorBoard drops what earlier starts wrote from this step on; step 4 is finished, and stays.
    assert (start.step, start.session_log.status) == (5, SessionLog.START)
    assert line.step == 6
    assert {value.tag: value.simple_value for value in line.summary.value} == {
        "train/loss": 0.25,
        "test/x": 3,
    }


def test_events_leave_out_what_no_curve_can_show(tmp_path, caplog):
    recorder = Recorder(tmp_path, step=0)
    recorder.write(2, 0.5, {"train/loss": float("nan"), "train/x": float("inf"), "train/y": 1.0})
    recorder.close()
    assert '"train/loss": NaN, "train/x": Infinity, "train/y": 1.0' in text_of(tmp_path)
    _, line = events_of(tmp_path)
    assert [value.tag for value in line.summary.value] == ["train/y"]
    assert not caplog.messages


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n')
    other = Recorder(tmp_path, step=4)
    other.write(6, 1.5, {"train/loss": 0.25})
    other.write_timing(6, examples_per_second=1.0, milliseconds=1.0)
    assert other.complete()
    other.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert text_of(tmp_path) == '{"step": 8}\n'


@contextlib.contextmanager
def files_of_at_most(size):
    """Makes writes beyond `size` bytes fail, as on a full disk. Not a fixture: pytest would still
    be under the limit when it writes to its own log."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_line_that_does_not_fit_on_the_disk_leaves_no_trace(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics._add_to_end(path, "1" * 60 + "\n")
    with files_of_at_most(100):
        with pytest.raises(OSError, match="File too large"):
            metrics._add_to_end(path, "2" * 60 + "\n")
        assert path.read_text() == "1" * 60 + "\n"
        metrics._add_to_end(path, "3" * 30 + "\n")
    assert path.read_text().splitlines()[1:] == ["3" * 30]


def test_deferred_lines_keep_their_order_and_file(tmp_path, monkeypatch):
    patient = Recorder(tmp_path, step=0, patient=True)
    add = metrics._add_to_end

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "_add_to_end", full)
    patient.write(1, 0.1, {})
    patient.write_timing(1, examples_per_second=2.0, milliseconds=3.0)
    patient.write(2, 0.2, {})
    assert not patient.complete()
    monkeypatch.setattr(metrics, "_add_to_end", add)
    patient.write(3, 0.3, {})
    assert patient.complete()
    patient.close()
    assert [json.loads(line)["step"] for line in text_of(tmp_path).splitlines()] == [1, 2, 3]
    assert [json.loads(x)["step"] for x in text_of(tmp_path, "timing.jsonl").splitlines()] == [1]
