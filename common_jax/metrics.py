"""A run's numbers on disk and on the terminal: metrics.jsonl, timing.jsonl, TensorBoard.

metrics.jsonl depends on config and seed only, so that a resumed run writes the same file, byte for
byte, as an undisturbed one; times go to timing.jsonl.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from common_jax.untrusted import RefusedError, brief, parse_json
from common_jax.workdir import write_bytes

MOST_AXES = 8  # of arrays among the metrics


class Recorder:
    """Writes a run's numbers, on process 0 only; where a run resumes, first drops lines of steps
    after `step`.

    Args:
      workdir: the run's folder.
      step: updates done before this start.
      total: updates in all, for the progress bar.
      title: heads the bar and the lines on the terminal.
      shown: names of the metrics on the terminal.
      patient: keeps lines that cannot be written, and tries again with the next, instead of
        raising the system's OSError.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        step: int,
        total: int,
        title: str,
        shown: Collection[str] = (),
        patient: bool = False,
    ):
        self._workdir, self._shown, self._patient = epath.Path(workdir), shown, patient
        self._unwritten = {}  # text by file
        self._main = jax.process_index() == 0
        self._title, self._total = title, total
        self._appends = "://" not in str(workdir)  # an object of a bucket is written as a whole
        if not self._main:
            return
        for name in ("metrics.jsonl", "timing.jsonl"):
            _drop_later(self._workdir / name, step)
        self._events = _Events(self._workdir, step)
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm.tqdm(total=total, initial=step, desc=title, unit="step") if terminal else None
        )

    def write(self, step: int, epoch: float, metrics: Mapping[str, Any]) -> None:
        """Appends one line of metrics: scalars, or arrays as lists."""
        if not self._main:
            return
        values = {name: _plain(value) for name, value in metrics.items()}
        line = {"step": step, "epoch": round(epoch, 6)} | values
        self._append("metrics.jsonl", json.dumps(line) + "\n")
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        self._events.write(step, scalars)
        shown = {name: value for name, value in scalars.items() if name in self._shown}
        if self._bar is None:
            text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            logging.info("%s  step %d/%d  %s", self._title, step, self._total, text)
        else:
            self._bar.set_postfix(
                {name.split("/")[-1]: f"{value:.4g}" for name, value in shown.items()},
                refresh=False,
            )

    def write_timing(self, step: int, *, examples_per_second: float, milliseconds: float) -> None:
        """Appends one line of timing, means since the line before."""
        if not self._main:
            return
        timing = {"examples_per_second": examples_per_second, "milliseconds_per_step": milliseconds}
        self._append("timing.jsonl", json.dumps({"step": step} | timing) + "\n")
        self._events.write(step, {f"timing/{name}": value for name, value in timing.items()})

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._main and self._bar is not None:
            self._bar.update(step - self._bar.n)

    def complete(self) -> bool:
        """Tries again to write lines that could not be written; returns whether all are now."""
        for name in list(self._unwritten):
            self._append(name, "")
        return not self._unwritten

    def close(self) -> None:
        """Flushes and closes everything.

        Raises:
          OSError: where lines still cannot be written.
        """
        if not self._main:
            return
        self._patient = False
        self.complete()
        self._events.close()
        if self._bar is not None:
            self._bar.close()

    def _append(self, name: str, text: str) -> None:
        path, text = self._workdir / name, self._unwritten.pop(name, "") + text
        try:
            if self._appends:
                _add_to_end(path, text)
            else:
                path.write_text((path.read_text() if path.exists() else "") + text)
        except OSError as error:
            if not self._patient:
                raise OSError(error.errno, error.strerror, str(path)) from error
            self._unwritten[name] = text
            logging.warning("%s cannot be written (%s): its lines are kept", path, error)


class _Events:
    """TensorBoard's events, written by the calling thread: tensorboardX's own thread ends when the
    disk is full, and its queue then blocks the run for ever. Events are dispensable: when one
    cannot be written, a warning says so, and no more are written.

    Args:
      workdir: gets the file.
      step: updates done before this start; TensorBoard drops later events of earlier starts.
    """

    def __init__(self, workdir: epath.Path, step: int):
        self._path, self._broken = str(workdir / "events"), False
        self._writer = self._attempt(EventsWriter, self._path)
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes numbers of a step."""
        values = [summary.scalar(name, value).value[0] for name, value in scalars.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        if not self._broken:
            self._attempt(self._writer.close)

    def _add(self, event: Event) -> None:
        if not self._broken:
            self._attempt(self._write, event)

    def _write(self, event: Event) -> None:
        self._writer.write_event(event)
        self._writer.flush()

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except OSError as error:
            self._broken = True
            logging.warning("%s: no more events for TensorBoard (%s)", self._path, error)
            return None


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics or timing file, in order. A last line without its newline that is no
    whole object was cut off when the run was killed, and is left out.

    Raises:
      ValueError: for any other line that is not a JSON object of numbers and lists of numbers with
        an integer "step", naming file and line.
    """
    lines = epath.Path(path).read_bytes().split(b"\n")
    metrics = [_parse_line(path, number, line) for number, line in enumerate(lines[:-1], 1)]
    with contextlib.suppress(ValueError):  # nothing, in a file that ends in a newline
        metrics.append(_parse_line(path, len(lines), lines[-1]))
    return metrics


def _parse_line(path: epath.PathLike, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = parse_json(line)
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            raise RefusedError('is not an object with an integer "step"')
        if odd := [name for name, value in values.items() if not _is_numbers(value)]:
            raise RefusedError(f"has {brief(odd[0])}: {brief(values[odd[0]])}, which is no number")
    except RefusedError as error:
        raise ValueError(
            f"{path}, line {number}: {error}: {line[:80]!r}; mend or delete this line"
        ) from None
    return values


def _is_numbers(value: Any, depth: int = 0) -> bool:
    """Whether a value is a number or a list of numbers, nested as deep as MOST_AXES."""
    if isinstance(value, list) and depth < MOST_AXES:
        return all(_is_numbers(part, depth + 1) for part in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> float | list:
    return np.asarray(value, np.float64).tolist()


def _add_to_end(path: epath.Path, text: str) -> None:
    """Appends all of the text or none of it."""
    left = text.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def _drop_later(path: epath.Path, step: int) -> None:
    """Rewrites `path` without lines of steps after `step` and without a last line that was cut off.
    Where it raises ValueError, as `read_metrics`, the file stays as it is."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    steps = [_parse_line(path, number, line)["step"] for number, line in enumerate(lines, 1)]
    kept = [line for line, own in zip(lines, steps, strict=True) if own <= step]
    write_bytes(path, b"".join(line + b"\n" for line in kept))
