"""A part of a save that fails in one process fails in all, at once and with its reason."""

import logging
import time

import jax
import pytest
from processes import pair

from common_jax import hosts
from common_jax.checkpoint import meeting

SECONDS = 240  # without an answer from the failed process, orbax waits for 20 minutes


def test_failure_in_one_process_is_the_reason_in_all(tmp_path):
    workdir = tmp_path / "run"
    with pair(workdir, run=("two_savers",), devices=1) as processes:
        outputs = []
        for one in processes:
            one.process.wait(timeout=SECONDS)
            outputs.append(one.output())
    for output in outputs:
        written, checked, last = (
            line for line in output.splitlines() if "could not be written" in line
        )
        for step, line, newest in ((2, written, 1), (6, last, 5)):
            assert f"the checkpoint of step {step} could not be written" in line
            assert "(process 1: " in line and "File too large" in line
            assert f"the newest intact one is that of step {newest}" in line
        assert "(process 0: its item 'params' is damaged)" in checked
        assert last.startswith("SaveError: ")
        assert "finished [1, 3, 5]" in output


@pytest.mark.parametrize(
    ("processes", "reason", "said"),
    [
        (1, None, "the checkpoint of step 7 is still being written, "),
        (2, None, "the checkpoint of step 7 is still being written; waiting for the other"),
        (
            2,
            "process 1: no space",
            "the checkpoint of step 7 has failed (process 1: no space); wai",
        ),
    ],
)
def test_long_save_is_noted_in_the_log(processes, reason, said, monkeypatch, caplog):
    monkeypatch.setattr(meeting, "REMINDER", 0.01)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(hosts, "published", lambda name: reason)
    caplog.set_level(logging.INFO)
    deadline = time.monotonic() + 60
    with meeting.Meeting().patient(7):
        while said not in caplog.text:
            assert time.monotonic() < deadline, caplog.text
            time.sleep(0.01)
