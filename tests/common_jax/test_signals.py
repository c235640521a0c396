"""Stop requests: immediate, or deferred while something may be lost; the second one kills."""

import os
import signal
import subprocess
import sys
import time

import pytest

from common_jax import hosts, signals

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two bytecode instructions


@pytest.fixture(autouse=True)
def terminal():
    """Ignores no signal: under `nohup`, SIGHUP would be ignored, and stay so."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"), [(NUMBERS[0], 0), (NUMBERS[1], 130), (NUMBERS[2], 129)]
)
def test_signal_stops_at_once_outside_deferred(number, status):
    before = signal.getsignal(number)
    with signals.listening():
        with pytest.raises(signals.Stopped):
            send(number)
        assert signals.status() == status
    with signals.listening(resumes=False):
        with pytest.raises(signals.Stopped):
            send(number)
        assert signals.status() == 128 + number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", NUMBERS)
def test_signal_inside_deferred_stops_at_its_end(number, monkeypatch, capfd):
    monkeypatch.setattr(hosts, "_stopping", False)
    done = []
    with signals.listening():
        with pytest.raises(signals.Stopped), signals.deferred():
            send(number)
            send(signal.SIGHUP)  # any number of times
            done.append("saved")
            with pytest.raises(signals.Stopped):
                hosts.check()
            done.append("closed")
        assert done == ["saved", "closed"]
        until_said(capfd, "asked to stop: saving at the next step\n")


def until_said(capfd, text: str) -> None:
    deadline, said = time.monotonic() + 5, ""
    while text not in said:
        assert time.monotonic() < deadline, said
        said += capfd.readouterr().err
        time.sleep(0.01)


def test_nothing_stops_without_a_signal():
    with signals.listening(), signals.deferred():
        assert not signals.requested()


def test_ignored_signals_stay_ignored():
    """As set by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.listening():
            send(signal.SIGHUP)
            assert not signals.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stopped_is_not_an_exception_subclass():
    assert not issubclass(signals.Stopped, Exception)


COMPILING = """
import os, signal, sys, threading, time
from common_jax import signals

def send():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

with signals.listening(), signals.deferred():
    threading.Thread(target=send, daemon=True).start()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        time.sleep(0.1)
"""


def test_second_signal_ends_the_process_at_once():
    process = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True)
    assert process.returncode == 130, process.stderr
    assert process.stderr.splitlines() == [
        "asked to stop: saving at the next step",
        "SIGINT again: ending at once",
    ]


def test_interrupted_tool_exits_with_130():
    @signals.ends_quietly
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130


def test_tool_cleans_up_on_sigterm():
    ended = []

    @signals.ends_quietly
    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            ended.append(True)

    usual = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 143 and ended
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, usual)
