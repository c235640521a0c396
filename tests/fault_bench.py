"""Where faults are injected, and how the rows of the table are counted."""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator

from processes import DIGITS, Started, finish_pair, says, start

from common_jax.checkpoint import finished_steps
from common_jax.metrics import read_metrics

FILES = ("metrics.jsonl", "result.json", "scores.json", "translations.tsv")
OFTEN = "--config.run.log_every=1"


@dataclasses.dataclass
class Row:
    """A line of the table.

    Attributes:
      fault: what was done to the runs.
      injected: how often it was done.
      survived: how often the run ended like an undisturbed one.
      lost: total number of recomputed steps.
      note: why it was not injected, or what went wrong.
      failed: whether anything went wrong other than differing files.
    """

    fault: str
    injected: int = 0
    survived: int = 0
    lost: int = 0
    note: str = ""
    failed: bool = False

    def fail(self, note: str) -> None:
        """Records a failure other than differing files: the fault then counts as not survived."""
        self.note, self.failed = note, True

    def count(self, workdir: pathlib.Path, undisturbed: pathlib.Path, lost: int = 0) -> None:
        """Counts an injected fault, after the run has been finished."""
        self.injected += 1
        self.lost += lost
        differing = [
            name for name in FILES if _content(workdir / name) != _content(undisturbed / name)
        ]
        if differing:
            self.note = f"{', '.join(differing)} differ"
        elif not self.failed:
            self.survived += 1


@dataclasses.dataclass
class Bench:
    """Where the faults are injected.

    Attributes:
      folder: parent of all workdirs.
      kills: number of kills.
      random: generator of the moments.
    """

    folder: pathlib.Path
    kills: int
    random: random.Random

    def new(self) -> pathlib.Path:
        """Returns a new workdir."""
        return pathlib.Path(tempfile.mkdtemp(dir=self.folder)) / "run"

    def undisturbed(self, run: tuple[str, ...] = DIGITS, *, two: bool = False) -> pathlib.Path:
        """Runs one or two processes undisturbed; returns the workdir."""
        workdir = self.new()
        if two:
            finish_pair(workdir, OFTEN, run=run)
        else:
            start(workdir, OFTEN, run=run).finish()
        return workdir


def moments() -> dict[str, Callable[[pathlib.Path, Started], bool]]:
    """Moments in a run's life, each a predicate of its workdir and process."""
    return {
        "in the first compilation": lambda w, _: (w / "config.json").exists(),
        "in training": lambda w, _: says(w / "metrics.jsonl", '"step": 15'),
        "in an evaluation": lambda w, _: says(w / "metrics.jsonl", '"step": 11'),
        "in a save": lambda w, _: bool(unfinished(w)),
    }


def lost_steps(workdir: pathlib.Path) -> int:
    """The number of steps that are in the log but in no checkpoint."""
    log = workdir / "metrics.jsonl"
    logged = [line["step"] for line in read_metrics(log)] if log.exists() else []
    return max(0, max(logged, default=0) - max(finished_steps(workdir / "checkpoints"), default=0))


def unfinished(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list((workdir / "checkpoints").glob("*tmp*"))


def _content(path: pathlib.Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


@contextlib.contextmanager
def small_disk(bench: Bench, row: Row) -> Iterator[pathlib.Path | None]:
    """A separate file system; None, with a note in the row, where it cannot be mounted."""
    if os.geteuid() != 0:
        row.note = "not injected: only root can mount a small file system"
        yield None
        return
    folder = bench.new()
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(filler: pathlib.Path, *, left: int = 0) -> None:
    """Fills the disk that the file is on, except for `left` bytes."""
    free = shutil.disk_usage(filler.parent).free
    filler.write_bytes(b"\0" * (free - left))


def fill_while_running(
    bench: Bench, row: Row, run: tuple[str, ...], *, policy: str, left: int, said: str
) -> None:
    """Fills a run's disk at step 15 until the run ends or, with policy "go_on", logs `said`; then
    frees space and finishes the run."""
    with small_disk(bench, row) as disk:
        if disk is None:
            return
        undisturbed = bench.undisturbed(run)
        workdir, filler, log = disk / "run", disk / "filler", bench.new().with_suffix(".log")
        flags = (OFTEN, f"--config.run.on_failed_save={policy}")
        process = start(workdir, *flags, run=run, log=log)
        process.send(signal.SIGSTOP, lambda: says(workdir / "metrics.jsonl", '"step": 15'))
        fill(filler, left=left)
        process.process.send_signal(signal.SIGCONT)
        lost = 0
        if policy == "stop":
            if (status := process.end()) != 2:
                row.fail(f"status {status}: {process.output()[-300:]}")
            lost = lost_steps(workdir)
            filler.unlink()
        else:
            process.send(0, lambda: said in process.output())
            filler.unlink()
            process.finish()
        if "No space left on device" not in process.output():
            row.fail("the run does not say so")
        start(workdir, *flags, run=run, log=log).finish()
        row.count(workdir, undisturbed, lost)
