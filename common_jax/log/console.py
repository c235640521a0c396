"""What a run shows on the terminal: what it is about to do, its progress, and how it ended."""

import logging
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any

import jax
import tqdm
from etils import epath
from jax.sharding import Mesh

from common_jax.optim import OptimConfig
from common_jax.state import TrainState, partition
from common_jax.task import Task

PAUSE = 10.0  # seconds between two lines when there is no terminal
BAR = "{desc}  step {n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}"
# Shorter labels for names from metrics.jsonl.
LABELS = {
    "train/loss": "loss",
    "train/learning_rate": "learning rate",
    "train/skipped": "skipped",
    "examples_per_second": "examples/s",
}
ALWAYS = ("train/learning_rate", "examples_per_second")
# Usual compilation times of the shipped configs; for TPUs, from docs/sizing.md.
COMPILING = {"cpu": "5 to 60 s", "gpu": "20 s to 2 min", "tpu": "1 to 5 min"}


class Console:
    """Shows a run's progress, on process 0: a bar on a terminal; elsewhere at most one line every
    PAUSE seconds, and one at the end.

    Args:
      title: prefix of the bar and the lines.
      step: updates done before this start.
      total: total number of updates.
      shown: names of metrics to show besides ALWAYS; each shows its latest value.
    """

    def __init__(self, title: str, *, step: int, total: int, shown: Collection[str] = ()):
        self._title, self._total, self._shown = title, total, (*shown, *ALWAYS)
        self._main = jax.process_index() == 0
        self._values: dict[str, float] = {}
        self._step, self._first = step, None  # `_first`: this start's first step and its end time
        self._bar, self._said, self._news = None, -PAUSE, False
        if self._main and step < total:
            usual = COMPILING.get(jax.default_backend(), COMPILING["gpu"])
            logging.info("%s: compiling the step (usually %s, less if cached)", title, usual)
        self._start = time.monotonic()

    def advance(self, step: int) -> None:
        """Advances to a step that has finished."""
        if not self._main:
            return
        self._step = step
        if self._first is None:
            # Set only now, so that the time left does not include compilation.
            self._first = step, time.monotonic()
            logging.info("%s: first step after %.0f s", self._title, self._first[1] - self._start)
            if sys.stderr.isatty():
                self._bar = tqdm.tqdm(
                    desc=self._title, initial=step, total=self._total, bar_format=BAR
                )
        elif self._bar is not None:
            self._bar.update(step - self._bar.n)

    def compiled(self, step: int, seconds: float) -> None:
        """Says that this step compiled another program. The time left does not include it."""
        if self._main and self._first is not None:
            first, end = self._first
            self._first = first, end + seconds
            logging.info(
                "%s: step %d has a batch of another shape; compiling took %.0f s",
                *(self._title, step, seconds),
            )

    def show(self, values: Mapping[str, Any]) -> None:
        """Shows new values of metrics."""
        if not self._main:
            return
        self._values |= {name: float(values[name]) for name in self._shown if name in values}
        self._news = True
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(self._parts()), refresh=False)
        elif time.monotonic() >= self._said + PAUSE:
            self._say()

    def close(self) -> None:
        """Closes the bar, or logs the last values."""
        if self._bar is not None:
            self._bar.close()
        elif self._news:
            self._say()

    def _say(self) -> None:
        timed = self._first is not None and self._first[0] < self._step < self._total
        left = f"  {self._left()} left" if timed else ""
        parts = "  ".join(self._parts())
        logging.info("%s  step %d/%d  %s%s", self._title, self._step, self._total, parts, left)
        self._said, self._news = time.monotonic(), False

    def _parts(self) -> list[str]:
        values = {name: self._values[name] for name in self._shown if name in self._values}
        if not values.get("train/skipped"):
            values.pop("train/skipped", None)
        return [f"{LABELS.get(name, name)} {value:.4g}" for name, value in values.items()]

    def _left(self) -> str:
        step, start = self._first
        rate = (time.monotonic() - start) / (self._step - step)  # evaluations included
        return tqdm.tqdm.format_interval(rate * (self._total - self._step))


def introduce(
    task: Task,
    optim: OptimConfig,
    abstract: TrainState,
    mesh: Mesh,
    workdir: epath.Path,
    config: Mapping[str, Any],
) -> None:
    """Logs what a run is about to do, and where."""
    if optim.rises:
        logging.warning(
            "%s: the learning rate rises to min_lr=%g, which is above its peak of %g (lr=%g for "
            "lr_per=%s examples, with batch=%d)",
            *(task.title, optim.min_lr, optim.peak_lr, optim.lr, optim.lr_per, optim.batch),
        )
    trained, frozen = partition(abstract.params, task.trainable)
    devices = mesh.devices.ravel()
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    total = optim.total_steps(task.steps_per_epoch)
    logging.info(
        "%s: %d x %s in %d %s, mesh %s, %s",
        task.title,
        len(devices),
        devices[0].device_kind,
        jax.process_count(),
        "process" if jax.process_count() == 1 else "processes",
        axes,
        config.get("precision", "float32"),
    )
    logging.info(
        "%s: trains %s parameters, with %s frozen, for %s steps of %s examples (%.4g epochs)",
        task.title,
        f"{_count(trained):,}",
        f"{_count(frozen) + _count(task.helpers):,}",
        f"{total:,}",
        f"{optim.batch:,}",
        total / task.steps_per_epoch,
    )
    logging.info("%s: its log is %s", task.title, workdir / "metrics.jsonl")


def conclude(scores: Mapping[str, float], command: str = "") -> None:
    """Logs the scores of a finished command, and a command line that uses what it trained."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    logging.info("finished%s", f": {values}" if values else "")
    if command:
        logging.info("to use it: %s", command)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
