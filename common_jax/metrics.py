"""A run's numbers: metrics.jsonl, timing.jsonl, TensorBoard, Weights & Biases.

metrics.jsonl depends only on config and seed, so a resumed run writes the same file, byte for byte,
as an uninterrupted one; timings go to timing.jsonl.
"""

import contextlib
import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from common_jax.untrusted import RefusedError, brief, parse_json
from common_jax.workdir import in_bucket, write_bytes

MOST_AXES = 8  # of array-valued metrics


class Recorder:
    """Writes a run's numbers, on process 0 only. When a run resumes, drops the lines beyond `step`
    first.

    Args:
      workdir: the run's folder.
      step: updates done before this start.
      tracker: also receives the scalars.
      patient: whether to keep lines that cannot be written and retry with the next ones, instead
        of raising the OSError.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        step: int,
        tracker: "Tracker | None" = None,
        patient: bool = False,
    ):
        self._workdir, self._patient = epath.Path(workdir), patient
        self._unwritten = {}  # text by file name
        self._main = jax.process_index() == 0
        self._appends = not in_bucket(workdir)  # objects in a bucket can only be rewritten
        if not self._main:
            return
        for name in ("metrics.jsonl", "timing.jsonl"):
            _drop_later(self._workdir / name, step)
        events = _Events(self._workdir, step)
        self._copies = (events,) if tracker is None else (events, tracker)

    def write(self, step: int, epoch: float, metrics: Mapping[str, Any]) -> None:
        """Appends one line of metrics: scalars, or arrays as lists."""
        if not self._main:
            return
        values = {name: _plain(value) for name, value in metrics.items()}
        line = {"step": step, "epoch": round(epoch, 6)} | values
        self._append("metrics.jsonl", json.dumps(line) + "\n")
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        self._copy(step, scalars)

    def write_timing(self, step: int, *, examples_per_second: float, milliseconds: float) -> None:
        """Appends one line of timings, averaged since the previous line."""
        if not self._main:
            return
        timing = {"examples_per_second": examples_per_second, "milliseconds_per_step": milliseconds}
        self._append("timing.jsonl", json.dumps({"step": step} | timing) + "\n")
        self._copy(step, {f"timing/{name}": value for name, value in timing.items()})

    def complete(self) -> bool:
        """Retries lines that could not be written; returns True if none are left."""
        for name in list(self._unwritten):
            self._append(name, "")
        return not self._unwritten

    def close(self) -> None:
        """Flushes and closes everything.

        Raises:
          OSError: if some lines still cannot be written.
        """
        if not self._main:
            return
        self._patient = False
        self.complete()
        for one in self._copies:
            one.close()

    def _copy(self, step: int, scalars: Mapping[str, float]) -> None:
        for one in self._copies:
            one.write(step, scalars)

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


class _Copy:
    """A second, dispensable destination of the scalars: the first failure logs a warning and
    disables it.

    Args:
      name: what is written, for the warning.
      failures: exceptions that count as a failure.
    """

    def __init__(self, name: str, *failures: type[Exception]):
        self._name, self._failures, self._broken = name, failures, False

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        if self._broken:
            return None
        try:
            return action(*arguments)
        except self._failures as error:
            self._broken = True
            logging.warning("stopped writing %s (%s)", self._name, error)
            return None


class _Events(_Copy):
    """TensorBoard events, written in the calling thread: tensorboardX's own thread dies when the
    disk is full, and its queue then blocks the run forever.

    Args:
      workdir: the folder of the event file.
      step: updates done before this start; TensorBoard drops events of previous starts beyond it.
    """

    def __init__(self, workdir: epath.Path, step: int):
        super().__init__(f"TensorBoard events in {workdir}", OSError)
        self._writer = self._attempt(EventsWriter, str(workdir / "events"))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes a step's scalars, without those that are not finite: if every step of a line was
        skipped, its averages are NaN, which a curve cannot show."""
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        values = [summary.scalar(name, value).value[0] for name, value in finite.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._attempt(lambda: self._writer.close())

    def _add(self, event: Event) -> None:
        self._attempt(self._write, event)

    def _write(self, event: Event) -> None:
        self._writer.write_event(event)
        self._writer.flush()


class Tracker(_Copy):
    """A Weights & Biases run. When a run resumes and repeats steps that were already logged, wandb
    drops them; the numbers are the same.

    Args:
      project: the project's name; created if it does not exist.
      workdir: names the run; also holds wandb's files, in the folder `wandb`, unless it is in a
        bucket.
      run_id: the run's id; an existing run with this id is continued.
      config: the run's config, as JSON.

    Raises:
      ValueError: if the run cannot be opened, with wandb's reason.
    """

    def __init__(
        self, project: str, workdir: epath.Path, *, run_id: str, config: Mapping[str, Any]
    ):
        import wandb

        super().__init__(f"metrics of {workdir} to Weights & Biases", OSError, wandb.Error)
        try:
            self._run = wandb.init(
                project=project,
                id=run_id,
                name="/".join(workdir.parts[-2:]),
                dir=None if in_bucket(workdir) else str(workdir),
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(console="off"),  # else it records every progress-bar redraw
            )
        except wandb.Error as error:
            raise ValueError(
                f"config.run.wandb={project!r}: {error}; run `wandb login`, set "
                "WANDB_MODE=offline, or leave config.run.wandb out"
            ) from error

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs a step's scalars."""
        self._attempt(lambda: self._run.log(dict(scalars), step=step))

    def close(self) -> None:
        """Waits until everything is sent."""
        self._attempt(self._run.finish)


def open_tracker(
    project: str | None, workdir: epath.Path, *, run_id: str, config: Mapping[str, Any]
) -> Tracker | None:
    """Opens a `Tracker`; None without a project, and on all processes but the first."""
    if project is None or jax.process_index() > 0:
        return None
    return Tracker(project, workdir, run_id=run_id, config=config)


def check_tracker(project: str | None) -> None:
    """Raises ValueError if `project` asks for Weights & Biases but wandb is not installed."""
    if project is None:
        return
    spec = importlib.util.find_spec("wandb")
    # A folder of W&B's records in the current directory is a package without a file.
    if spec is None or spec.origin is None:
        raise ValueError(
            f"config.run.wandb={project!r} needs the package wandb, which is not installed: "
            "pip install wandb, or leave config.run.wandb out"
        )


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics or timing file, in order. Skips an incomplete last line without a
    newline, which was cut off when the run was killed.

    Raises:
      ValueError: for any other line that is not a JSON object of numbers and lists of numbers with
        an integer "step" and, if it has one, a finite "epoch", naming file and line.
    """
    lines = epath.Path(path).read_bytes().split(b"\n")
    metrics = [_parse_line(path, number, line) for number, line in enumerate(lines[:-1], 1)]
    with contextlib.suppress(ValueError):  # an incomplete line, or "" after the last newline
        metrics.append(_parse_line(path, len(lines), lines[-1]))
    return metrics


def scalar(path: epath.PathLike, line: Mapping[str, Any], name: str) -> float | None:
    """The value of a metric in a line of `path`; None if the line does not have it.

    Raises:
      ValueError: if it is a list.
    """
    value = line.get(name)
    if isinstance(value, list):
        raise ValueError(
            f"{path}: {name} of step {line['step']} is {brief(value)}, which is not a number; fix "
            "or delete this line"
        )
    return value


def _parse_line(path: epath.PathLike, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = parse_json(line)
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            raise RefusedError('is not an object with an integer "step"')
        if odd := [name for name, value in values.items() if not _is_numbers(value)]:
            raise RefusedError(
                f"has {brief(odd[0])}: {brief(values[odd[0]])}, which is not a number"
            )
        epoch = values.get("epoch", 0)
        if isinstance(epoch, list) or not abs(epoch) < math.inf:
            raise RefusedError(f'has "epoch": {brief(epoch)}, which is not a finite number')
    except RefusedError as error:
        raise ValueError(
            f"{path}, line {number}: {error}: {line[:80]!r}; fix or delete this line"
        ) from None
    return values


def _is_numbers(value: Any, depth: int = 0) -> bool:
    """Whether a value is a number, or a list of numbers nested at most MOST_AXES deep."""
    if isinstance(value, list) and depth < MOST_AXES:
        return all(_is_numbers(part, depth + 1) for part in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> float | list:
    return np.asarray(value, np.float64).tolist()


def _add_to_end(path: epath.Path, text: str) -> None:
    """Appends all of the text or none of it."""
    left = text.encode()
    # Unbuffered, so that nothing is left to be flushed after a failure has been undone.
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def _drop_later(path: epath.Path, step: int) -> None:
    """Rewrites `path` without the lines beyond `step` and without a last line that was cut off.
    Raises ValueError as `read_metrics`, leaving the file unchanged."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    steps = [_parse_line(path, number, line)["step"] for number, line in enumerate(lines, 1)]
    kept = [line for line, own in zip(lines, steps, strict=True) if own <= step]
    write_bytes(path, b"".join(line + b"\n" for line in kept))
