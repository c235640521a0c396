"""What runs survive: kills, requests to stop, corrupted files, a full disk, a host that dies.

    make test-faults
    PYTHONPATH=.:tests:tools python tests/faults.py [--kills 20] [--seed 0] [--only kills full_disk]

Every fault is injected for real into separate processes, and the run is restarted until it
finishes. It has survived if metrics.jsonl and result.json (and CLIPTrans' translations) are then
identical, byte for byte, to those of an undisturbed run. Lost steps are those that had to be
recomputed: the ones between the newest complete checkpoint and the last line of the log.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import faults_checkpoints
import faults_processes
import tiny_cliptrans
from fault_bench import (
    OFTEN,
    Bench,
    Row,
    fill_while_running,
    lost_steps,
    moments,
    unfinished,
)
from processes import DIGITS, Started, finish_all, finish_pair, pair, says, start

from common_jax.checkpoint import finished_steps
from common_jax.commands.sweep.jobs import show
from common_jax.report import Table
from common_jax.signals import ends_quietly

# Wider, so that a checkpoint is large compared with a run's log and events.
WIDE = (*DIGITS, "--config.model.width=96", OFTEN)


@ends_quietly
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    flags = parser.parse_args()
    begin = time.time()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        bench = Bench(pathlib.Path(folder), flags.kills, random.Random(flags.seed))
        rows = []
        for name in flags.only:
            for row in FAULTS[name](bench):
                rows.append(row)
                survived = f"{row.survived} of {row.injected} survived"
                print(f"{time.time() - begin:5.0f} s  {row.fault}: {survived}", flush=True)
    lines = tuple((r.fault, str(r.injected), str(r.survived), str(r.lost), r.note) for r in rows)
    show(Table("Faults", ("fault", "injected", "survived", "lost steps", ""), lines))
    if any(row.survived < row.injected for row in rows):
        sys.exit("not all faults were survived")


def kills(bench: Bench) -> Iterator[Row]:
    """kill -9 at random moments in a run's life, every fourth in the middle of a save."""
    undisturbed = bench.undisturbed()  # also fills the compilation cache
    began = time.monotonic()
    bench.undisturbed()
    life = time.monotonic() - began
    anywhere, saving = Row("kill -9 at a random moment"), Row("kill -9 in the middle of a save")
    workdir, due = bench.new(), [anywhere, anywhere, anywhere, saving] * bench.kills
    struck: list[tuple[Row, int]] = []  # faults in the current run
    for row in due[: bench.kills]:
        process, lost = start(workdir, OFTEN), None
        if row is saving:
            lost = _kill_when(process, workdir, lambda w=workdir: bool(unfinished(w)))
        else:
            at = time.monotonic() + bench.random.uniform(0, life)
            lost = _kill_when(process, workdir, lambda at=at: time.monotonic() > at)
        if lost is not None:
            struck.append((row, lost))
        if lost is None or (workdir / "result.json").exists():
            process.end()
            workdir, struck = _settle(bench, workdir, undisturbed, struck)
    _settle(bench, workdir, undisturbed, struck)
    yield anywhere
    yield saving


def _settle(bench, workdir, undisturbed, struck):
    """Finishes a run that was killed several times, and counts the kills; returns a new workdir and
    an empty list."""
    start(workdir, OFTEN).finish()
    for row, lost in struck:
        row.count(workdir, undisturbed, lost)
    return bench.new(), []


def requests(bench: Bench) -> Iterator[Row]:
    """SIGTERM to a run of one process."""
    undisturbed = bench.undisturbed()
    for where, moment in moments().items():
        workdir, row = bench.new(), Row(f"SIGTERM, one process, {where}")
        process = start(workdir, OFTEN)
        process.send(signal.SIGTERM, lambda w=workdir, p=process, m=moment: m(w, p))
        process.finish()
        lost = lost_steps(workdir)
        start(workdir, OFTEN).finish()
        row.count(workdir, undisturbed, lost)
        yield row


def damaged_files(bench: Bench) -> Iterator[Row]:
    """Files of the newest checkpoint truncated or deleted, one kind at a time."""
    undisturbed, stopped = bench.undisturbed(), bench.new()
    process = start(stopped, OFTEN)
    process.kill(lambda: says(stopped / "metrics.jsonl", '"step": 40'))
    newest = finished_steps(stopped / "checkpoints")[-1]
    folder = stopped / "checkpoints" / str(newest)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    cut, deleted = Row("a checkpoint's file cut to half"), Row("a checkpoint's file deleted")
    cases = [
        (row, damage, path)
        for path in _one_of_each(files)
        for row, damage in ((cut, _halve), (deleted, pathlib.Path.unlink))
    ]

    def suffer(case):
        _, damage, path = case
        workdir = bench.new()
        shutil.copytree(stopped, workdir)
        damage(workdir / "checkpoints" / str(newest) / path)
        return workdir, start(workdir, OFTEN).finish()

    # Two at a time: nothing here depends on timing.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for (row, *_), (workdir, output) in zip(cases, pool.map(suffer, cases), strict=True):
            unreadable = f"checkpoints/{newest} cannot be read" in output
            row.count(workdir, undisturbed, 11 if unreadable else 0)
    yield cut
    yield deleted


def full_disk(bench: Bench) -> Iterator[Row]:
    """A disk with room for the log but not for another checkpoint."""
    said = "could not be written"
    for policy in ("stop", "go_on"):
        row = Row(f"disk full in a save, on_failed_save={policy}")
        fill_while_running(bench, row, WIDE, policy=policy, left=300_000, said=said)
        yield row


def two_processes(bench: Bench) -> Iterator[Row]:
    """SIGTERM to one of two processes, and one process that dies."""
    undisturbed = bench.undisturbed(two=True)
    for where, moment in moments().items():
        workdir, row = bench.new(), Row(f"SIGTERM to one of two processes, {where}")
        with pair(workdir, OFTEN) as (first, second):
            second.send(signal.SIGTERM, lambda w=workdir, p=second, m=moment: m(w, p))
            finish_all((first, second))
        lost = lost_steps(workdir)
        finish_pair(workdir, OFTEN)
        row.count(workdir, undisturbed, lost)
        yield row
    for number, name in enumerate(("the first", "the second")):
        workdir, row = bench.new(), Row(f"kill -9 of {name} of two processes")
        with pair(workdir, OFTEN) as processes:
            processes[number].kill(lambda w=workdir: says(w / "metrics.jsonl", '"step": 27'))
            began, other = time.monotonic(), processes[1 - number]
            if other.end() == 0:
                row.note = "the other one ended as if finished"
            row.note = f"the other one ended after {time.monotonic() - began:.0f} s"
        lost = lost_steps(workdir)
        finish_pair(workdir, OFTEN)
        row.count(workdir, undisturbed, lost)
        yield row


def decoding(bench: Bench) -> Iterator[Row]:
    """SIGTERM to one of two processes while they translate."""
    corpus = tiny_cliptrans.write_corpus(bench.folder / "corpus")
    path = bench.folder / "translate.py"
    path.write_text(
        "import pathlib\n"
        "from common_jax.config import unfreeze\n"
        "from tiny_cliptrans import tiny_config\n"
        "def get_config(arg=None):\n"
        f"    return unfreeze(tiny_config('translate', pathlib.Path({str(corpus)!r})))\n"
    )
    run = (
        "cliptrans_jax.main",
        f"--config={path}",
        "--config.mesh.data=8",
        "--config.model.mapper.prefix=0",
        "--config.run.compilation_cache=None",
    )
    undisturbed = bench.undisturbed(run, two=True)
    workdir, row = bench.new(), Row("SIGTERM to one of two processes, in decoding")
    steps = json.loads((undisturbed / "result.json").read_text())["steps"]
    with pair(workdir, OFTEN, run=run) as (first, second):
        # At the last save, since it takes a second until a signal is noticed.
        second.send(signal.SIGTERM, lambda: any((workdir / "checkpoints").glob(f"{steps}*")))
        finish_all((first, second))
    if (workdir / "scores.json").exists():
        row.note = "too late: it was decoded already"
    finish_pair(workdir, OFTEN, run=run)
    row.count(workdir, undisturbed)
    yield row


FAULTS = (
    {
        "kills": kills,
        "requests": requests,
        "damaged_files": damaged_files,
        "full_disk": full_disk,
        "two_processes": two_processes,
        "decoding": decoding,
    }
    | faults_checkpoints.FAULTS
    | faults_processes.FAULTS
)


def _kill_when(process: Started, workdir: pathlib.Path, moment: Callable[[], bool]) -> int | None:
    """Kills the process at that moment; returns the lost steps, or None if it has ended before."""
    while not moment():
        if not process.running():
            assert process.end() == 0, process.output()
            return None
        time.sleep(0.0005)
    process.process.kill()
    process.process.wait()
    return lost_steps(workdir)


def _one_of_each(files: list[pathlib.Path]) -> list[pathlib.Path]:
    """One file of each kind. Files are of one kind if they are in the same folder of their item and
    have the same name, hashes aside. Items that hold arrays have the same kinds, and take turns."""
    kinds: dict[tuple[str, ...], list[pathlib.Path]] = {}
    for path in files:
        item, *inner = path.parts
        name = inner[:-1] if len(path.stem) >= 32 else inner
        arrays = item in ("params", "trainer", "average")
        kinds.setdefault(("arrays" if arrays else item, *name), []).append(path)
    return [alike[turn % len(alike)] for turn, alike in enumerate(kinds.values())]


def _halve(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


if __name__ == "__main__":
    main()
