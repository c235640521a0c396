"""Where faults are injected, and how their rows are counted."""

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
      fault: what was done to runs.
      injected: how often.
      survived: how often the run ended as an undisturbed one.
      lost: steps computed again, of all of them.
      note: why it was not injected, or what went wrong.
      failed: whether something went wrong besides the files.
    """

    fault: str
    injected: int = 0
    survived: int = 0
    lost: int = 0
    note: str = ""
    failed: bool = False

    def fail(self, note: str) -> None:
        """Notes what went wrong besides the files: the fault then counts as not survived."""
        self.note, self.failed = note, True

    def count(self, workdir: pathlib.Path, undisturbed: pathlib.Path, lost: int = 0) -> None:
        """Enters an injected fault after which the run was finished."""
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
      folder: of all runs.
      kills: how many.
      random: of the moments.
    """

    folder: pathlib.Path
    kills: int
    random: random.Random

    def new(self) -> pathlib.Path:
        """The workdir of another run."""
        return pathlib.Path(tempfile.mkdtemp(dir=self.folder)) / "run"

    def undisturbed(self, run: tuple[str, ...] = DIGITS, *, two: bool = False) -> pathlib.Path:
        """An undisturbed run of one process or two."""
        workdir = self.new()
        if two:
            finish_pair(workdir, OFTEN, run=run)
        else:
            start(workdir, OFTEN, run=run).finish()
        return workdir


def moments() -> dict[str, Callable[[pathlib.Path, Started], bool]]:
    """Moments of a run's life, each as a question to its workdir and process."""
    return {
        "in the first compilation": lambda w, _: (w / "config.json").exists(),
        "in training": lambda w, _: says(w / "metrics.jsonl", '"step": 15'),
        "in an evaluation": lambda w, _: says(w / "metrics.jsonl", '"step": 11'),
        "in a save": lambda w, _: bool(unfinished(w)),
    }


def lost_steps(workdir: pathlib.Path) -> int:
    """Steps that are in the log and in no checkpoint."""
    log = workdir / "metrics.jsonl"
    logged = [line["step"] for line in read_metrics(log)] if log.exists() else []
    return max(0, max(logged, default=0) - max(finished_steps(workdir / "checkpoints"), default=0))


def unfinished(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list((workdir / "checkpoints").glob("*tmp*"))


def _content(path: pathlib.Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


@contextlib.contextmanager
def small_disk(bench: Bench, row: Row) -> Iterator[pathlib.Path | None]:
    """A file system of its own; None, which the row notes, where it may not be mounted."""
    if os.geteuid() != 0:
        row.note = "not injected: only root may mount a small file system"
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
    """Leaves `left` bytes of the disk that the file is on."""
    free = shutil.disk_usage(filler.parent).free
    filler.write_bytes(b"\0" * (free - left))


def fill_while_running(
    bench: Bench, row: Row, run: tuple[str, ...], *, policy: str, left: int, said: str
) -> None:
    """Fills the disk of a run at step 15, until it ends or, with policy "go_on", says `said`;
    then makes room and finishes it."""
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
