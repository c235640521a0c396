"""Requests to stop: SIGTERM from schedulers, Ctrl-C (SIGINT), a terminal that hangs up (SIGHUP).

The first request stops the run cleanly. While a run has something to lose (`deferred`), the request
is only recorded, and `common_jax.hosts.check` stops at the next step; anywhere else the run stops
immediately. A second request ends the process, with two exceptions: one that arrives right after
the first, since one Ctrl-C may reach the process by two routes, and SIGHUP, which a closing
terminal sends several times.

Python runs handlers only between bytecode instructions, so never during a compilation. A thread
therefore reads signal numbers from a pipe, which Python's C-level handler writes to immediately. It
acknowledges the request and counts further ones.
"""

import contextlib
import ctypes
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Exit statuses. To a scheduler, a run that it stopped has succeeded; in a shell, the next command
# of a script must not run.
STATUSES = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}

TOGETHER = 0.5  # seconds within which signals count as one request

_received: list[int] = []  # signals that this process has received, without repeats
_resumes = True  # whether the same command continues what a signal stopped
_deferrals = 0
_connecting = False
_tell_jax: Callable[[int], None] | None = None  # jax's own handler of SIGTERM, once connected


class Stopped(BaseException):
    """The run was asked to stop, and stops here with everything saved. Like KeyboardInterrupt, this
    is not an Exception, so that nothing handles it as a failure."""


def heeded() -> list[signal.Signals]:
    """The signals that ask this process to stop: SIGTERM, and the others unless the process was
    started with them ignored, like SIGHUP under nohup."""
    return [x for x in REQUESTS if x == signal.SIGTERM or signal.getsignal(x) != signal.SIG_IGN]


@contextlib.contextmanager
def listening(*, resumes: bool = True) -> Iterator[None]:
    """Accepts requests to stop within the block. Does nothing outside the main thread. A signal
    that was ignored before stays ignored. `resumes` tells whether the same command continues what
    was stopped, see `status`."""
    global _resumes
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = heeded()
    receive, send = os.pipe()
    os.set_blocking(send, False)
    _received.clear()
    _resumes = resumes
    pipe = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _stop) for number in numbers}
    threading.Thread(target=_watch, args=(receive,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe)
        for number, handler in handlers.items():
            # As in `_share_sigterm`: without this handler, SIGTERM would end the process at once.
            if number != signal.SIGTERM or not jax.distributed.is_initialized():
                signal.signal(number, handler)
        os.close(send)  # ends the thread


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A block that a request to stop does not interrupt. The request takes effect at the end of the
    block, or where the block checks for it."""
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
    if not _deferrals and requested() and not jax.distributed.is_initialized():
        raise Stopped


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """A block in which jax connects this process to the others of its run, outside Python. The
    first request to stop ends the process at once: there is nothing to save."""
    global _connecting
    python, _connecting = _c_handler(), True
    try:
        yield
    finally:
        _connecting = False
        _share_sigterm(python)


def _share_sigterm(python: int | None) -> None:
    """Once connected, jax handles SIGTERM in C, and neither `_stop` nor `_watch` would see one.
    Reinstalls Python's handler, at address `python`, and keeps jax's for `_watch` to call."""
    global _tell_jax
    jaxs = _c_handler()
    if jaxs is not None and jaxs != python and signal.getsignal(signal.SIGTERM) is _stop:
        _tell_jax = ctypes.CFUNCTYPE(None, ctypes.c_int)(jaxs)
        signal.signal(signal.SIGTERM, _stop)


def _c_handler() -> int | None:
    """The address of the C function that handles SIGTERM; None if it is the system's default."""
    action = ctypes.create_string_buffer(1024)  # a struct sigaction, which begins with the handler
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, action)
    return ctypes.c_void_p.from_buffer(action).value


def requested() -> bool:
    """Whether this process was asked to stop."""
    return bool(_received)


def status() -> int:
    """The exit status of a command that was stopped. If its work is lost (`listening` with
    resumes=False), 128 plus the number of the signal, as for a process that the signal ends."""
    return _status(_received[0]) if _received else 0


def _status(number: int) -> int:
    return STATUSES[number] if _resumes else 128 + number


def ends_quietly(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Decorates a tool's main function. Ctrl-C ends it with one line instead of a traceback.
    SIGTERM raises SystemExit in it, so that `except` and `finally` blocks can end processes that it
    has started.
    """

    @functools.wraps(main)
    def wrapped(*arguments: object) -> int | None:
        if threading.current_thread() is not threading.main_thread():
            return main(*arguments)  # signals are delivered to the main thread only
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            return main(*arguments)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(STATUSES[signal.SIGINT])
        finally:
            signal.signal(signal.SIGTERM, before)

    return wrapped


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _stop(number: int, frame: object) -> None:
    """The signal handler, which Python runs in the main thread."""
    if number not in _received:
        _received.append(number)
    if _connecting:  # `_watch` ends the process, whether or not this thread can run Python
        return
    if not _deferrals and not jax.distributed.is_initialized():
        raise Stopped


def _watch(receive: int) -> None:
    """Acknowledges a request, forwards it to jax, and ends the process at the second one."""
    first = None
    with open(receive, "rb", buffering=0) as pipe:
        while content := pipe.read(1):
            number, now = content[0], time.monotonic()
            if number not in STATUSES:
                continue
            if first is not None:
                if number == signal.SIGHUP or now - first < TOGETHER:
                    continue
                _say(f"{signal.Signals(number).name} again: ending at once\n")
                logging.shutdown()
                os._exit(128 + number)
            first = now
            if _connecting:  # the main thread, which would raise Stopped, waits outside Python
                _say("stopped as requested, before all processes were connected\n")
                logging.shutdown()
                os._exit(_status(number))
            if _deferrals or jax.distributed.is_initialized():
                _say("asked to stop: saving at the next step\n")
            if _tell_jax is not None:  # it agrees with the other processes where to stop
                _tell_jax(signal.SIGTERM)


def _say(text: str) -> None:
    # Not print, which the main thread may be in the middle of.
    with contextlib.suppress(OSError):  # if the terminal is gone
        os.write(sys.__stderr__.fileno(), text.encode())
