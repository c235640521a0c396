"""Requests to stop: SIGTERM from schedulers, Ctrl-C (SIGINT), a terminal that hangs up (SIGHUP).

The first one stops the run in good order. Where a run has something to lose (`deferred`), the
request is only noted, and `common_jax.hosts.check` stops at the next step; anywhere else the run
stops at once. A second request ends the process, with two exceptions: one that comes together with
the first, since one Ctrl-C may arrive by two routes, and SIGHUP, which a closing terminal sends
several times.

Python calls handlers between two of its own instructions, so never during a compilation. A thread
therefore reads the numbers of signals from a pipe, into which Python's C code writes them at once.
It says that the request has arrived, and counts.
"""

import contextlib
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
# A scheduler that stops a run takes it as a success; a shell must not run the next command.
STATUSES = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}

TOGETHER = 0.5  # seconds within which signals count as one request

_received: list[int] = []  # requests to this process
_deferrals = 0


class Stopped(BaseException):
    """The run was asked to stop, and does so here, with everything saved. Like KeyboardInterrupt it
    is no Exception, so that nothing handles it as a failure."""


def heeded() -> list[signal.Signals]:
    """The signals that ask this process to stop: SIGTERM, and those that it was not started to
    ignore, as SIGHUP is under nohup."""
    return [x for x in REQUESTS if x == signal.SIGTERM or signal.getsignal(x) != signal.SIG_IGN]


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Accepts requests to stop, until the end of the block; in the main thread, elsewhere it does
    nothing. A signal that was ignored before stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = heeded()
    receive, send = os.pipe()
    os.set_blocking(send, False)
    _received.clear()
    pipe = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _stop) for number in numbers}
    threading.Thread(target=_watch, args=(receive,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe)
        for number, handler in handlers.items():
            # jax's own handler of SIGTERM is not one of Python's, and stays.
            if number != signal.SIGTERM or not jax.distributed.is_initialized():
                signal.signal(number, handler)
        os.close(send)  # which ends the thread


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A block that a request to stop does not interrupt; the request takes effect at the end of the
    block, or where the block asks for it."""
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
    if not _deferrals and requested() and not jax.distributed.is_initialized():
        raise Stopped


def requested() -> bool:
    """Whether this process was asked to stop."""
    return bool(_received)


def status() -> int:
    """The exit status of a run that was stopped."""
    return STATUSES[_received[0]] if _received else 0


def ends_quietly(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """A tool's main function. Ctrl-C ends it with a line in place of a traceback. SIGTERM raises
    SystemExit in it, so that `except` and `finally` blocks can end processes that it has started.
    """

    @functools.wraps(main)
    def wrapped(*arguments: object) -> int | None:
        if threading.current_thread() is not threading.main_thread():
            return main(*arguments)  # signals do not reach it
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
    """The handler, which Python calls in the main thread."""
    if number not in _received:
        _received.append(number)
    if not _deferrals and not jax.distributed.is_initialized():
        raise Stopped


def _watch(receive: int) -> None:
    """Announces a request, hands it to jax, and ends the process at the second one."""
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
            if _deferrals or jax.distributed.is_initialized():
                _say("asked to stop: saving at the next step\n")
            if jax.distributed.is_initialized():
                # jax handles SIGTERM only, and agrees with the other processes where to stop.
                os.kill(os.getpid(), signal.SIGTERM)


def _say(text: str) -> None:
    # Not by print: the main thread may be in the middle of a line.
    with contextlib.suppress(OSError):  # of a terminal that is gone
        os.write(sys.__stderr__.fileno(), text.encode())
