"""Where a run's numbers go: metrics.jsonl, timing.jsonl, TensorBoard and the terminal.

metrics.jsonl holds only what is a function of config and seed, so that a resumed run's file is the
same, byte for byte, as an undisturbed one's; how long things took goes to timing.jsonl.
"""

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from etils import epath


class Recorder:
    """Writes a run's numbers, on process 0 only; going on at `step`, it first drops lines of later
    steps.

    Args:
      workdir: the run's folder.
      step: updates done before this start.
      total: updates in all, for the progress bar.
      title: what the bar and the log lines are headed with.
    """

    def __init__(self, workdir: epath.PathLike, *, step: int, total: int, title: str):
        self._workdir = epath.Path(workdir)
        self._main = jax.process_index() == 0
        self._title, self._total = title, total
        self._appends = "://" not in str(workdir)  # an object of a bucket is written as a whole
        if not self._main:
            return
        for name in ("metrics.jsonl", "timing.jsonl"):
            _drop_later(self._workdir / name, step)
        self._events = tensorboardX.SummaryWriter(str(self._workdir), purge_step=step)
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm.tqdm(total=total, initial=step, desc=title, unit="step") if terminal else None
        )

    def write(self, step: int, epoch: float, metrics: Mapping[str, Any]) -> None:
        """Appends one line of metrics: scalars, or arrays as lists."""
        if not self._main:
            return
        values = {name: _plain(value) for name, value in metrics.items()}
        self._append("metrics.jsonl", {"step": step, "epoch": round(epoch, 6)} | values)
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        shown = {name: value for name, value in scalars.items() if name in _SHOWN}
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
        self._append("timing.jsonl", {"step": step} | timing)
        for name, value in timing.items():
            self._events.add_scalar(f"timing/{name}", value, step)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._main and self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Flushes and closes everything."""
        if not self._main:
            return
        self._events.close()
        if self._bar is not None:
            self._bar.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        path, text = self._workdir / name, json.dumps(line) + "\n"
        if self._appends:
            with path.open("a") as file:
                file.write(text)
        else:
            path.write_text((path.read_text() if path.exists() else "") + text)


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics or timing file, in order. A last line that lacks its newline and is
    no whole object was cut off when the run was killed, and is left out.

    Raises:
      ValueError: for any other line that is not a JSON object with an integer "step", naming file
        and line.
    """
    lines = epath.Path(path).read_bytes().split(b"\n")
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise ValueError('not an object with an integer "step"')
        except ValueError as error:  # those of json and of the decoding among them
            if number == len(lines):  # nothing, in a file that ends in a newline
                break
            message = f"{path}, line {number}: {error}: {line[:80]!r}; mend or delete this line"
            raise ValueError(message) from error
        metrics.append(values)
    return metrics


_SHOWN = (
    "train/loss",
    "train/skipped",
    "test/loss",
    "test/accuracy",
    "val/loss",
    "val/accuracy",
    "val/bleu",
    "val/chrf",
)


def _plain(value: Any) -> float | list:
    return np.asarray(value, np.float64).tolist()


def _drop_later(path: epath.Path, step: int) -> None:
    """Rewrites `path` without lines of steps after `step`, nor a last line that a kill cut off."""
    if not path.exists():
        return
    lines = path.read_text().split("\n")[:-1]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    rewritten = path.parent / f"{path.name}.tmp"
    rewritten.write_text("".join(line + "\n" for line in kept))
    rewritten.replace(path)
