"""Faults of processes and disks: two starts in one workdir, signals from a terminal, a disk that
fills up while writing the log, the report or a picture, and one that becomes read-only."""

import signal
import subprocess
import time
from collections.abc import Iterator

from fault_bench import (
    OFTEN,
    Bench,
    Row,
    fill,
    fill_while_running,
    lost_steps,
    moments,
    small_disk,
)
from processes import DIGITS, finish_pair, pair, says, start

from common_jax.report import is_picture


def one_workdir(bench: Bench) -> Iterator[Row]:
    """Starts one command twice, 0, 2 and 30 s apart. The run is long enough for the last."""
    longer = ("--config.optim.steps=2200", "--config.run.log_every=50")
    longer += ("--config.run.eval_every=10", "--config.run.checkpoint_every=10")
    undisturbed = bench.new()
    start(undisturbed, *longer).finish()
    for seconds in (0, 2, 30):
        workdir, row = bench.new(), Row(f"a second start in one workdir, {seconds} s later")
        first = start(workdir, *longer, log=workdir.with_suffix(".first.log"))
        time.sleep(seconds)
        if not first.running():
            row.fail("too late: the first had ended already")
        second = start(workdir, *longer, log=workdir.with_suffix(".second.log"))
        statuses = sorted((first.end(), second.end()))
        if statuses != [0, 2]:
            row.fail(f"they ended with status {statuses}")
        loser = first if first.process.returncode else second
        winner = second if loser is first else first
        named = f"is in use by process {winner.process.pid} on "
        if named not in loser.output() or len(loser.output().splitlines()) > 3:
            row.fail("the loser does not name the process that has the workdir")
        row.count(workdir, undisturbed)
        yield row


def terminal(bench: Bench) -> Iterator[Row]:
    """SIGINT and SIGHUP, to a single process and to one of two."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:  # in the background; inherited by runs
            signal.signal(number, signal.SIG_DFL)
    undisturbed = bench.undisturbed()
    for number, status in ((signal.SIGINT, 130), (signal.SIGHUP, 129)):
        for where, moment in moments().items():
            workdir, row = bench.new(), Row(f"{number.name}, one process, {where}")
            process = start(workdir, OFTEN)
            process.send(number, lambda w=workdir, p=process, m=moment: m(w, p))
            if (found := process.end()) != status:
                row.fail(f"status {found}")
            if "Traceback" in process.output():
                row.fail("a traceback")
            lost = lost_steps(workdir)
            start(workdir, OFTEN).finish()
            row.count(workdir, undisturbed, lost)
            yield row
    undisturbed = bench.undisturbed(two=True)
    for number in (signal.SIGINT, signal.SIGHUP):
        workdir, row = bench.new(), Row(f"{number.name} to one of two processes")
        with pair(workdir, OFTEN) as (first, second):
            second.send(number, lambda w=workdir: says(w / "metrics.jsonl", '"step": 15'))
            first.finish()
            if (found := second.end()) != 128 + number:
                row.fail(f"status {found}")
        lost = lost_steps(workdir)
        finish_pair(workdir, OFTEN)
        row.count(workdir, undisturbed, lost)
        yield row


def full_files(bench: Bench) -> Iterator[Row]:
    """A disk without room for a line of the log, and one without room for report and picture, which
    the first attempt left as empty files."""
    said = "its lines are kept"
    for policy in ("stop", "go_on"):
        row = Row(f"disk full in a line of the log, on_failed_save={policy}")
        fill_while_running(bench, row, DIGITS, policy=policy, left=0, said=said)
        yield row
    undisturbed = bench.undisturbed()
    row = Row("disk full in report and picture")
    with small_disk(bench, row) as disk:
        if disk is not None:
            workdir, filler = disk / "run", disk / "filler"
            log = bench.new().with_suffix(".log")
            start(workdir, OFTEN, log=log).finish()
            made = [workdir / "report.html", workdir / "plots" / "curves.png"]
            for path in made:
                path.write_bytes(b"")
            fill(filler)
            output = start(workdir, OFTEN, log=log).finish()
            if output.count("No space left on device") < 2:
                row.fail("the run does not say so")
            filler.unlink()
            start(workdir, OFTEN, log=log).finish()
            if not made[0].read_text().endswith("</html>\n") or not is_picture(made[1]):
                row.fail("report or picture is not mended")
            row.count(workdir, undisturbed)
    yield row


def read_only(bench: Bench) -> Iterator[Row]:
    """A finished run, started again on a read-only disk."""
    row, undisturbed = Row("a finished run started again on a read-only disk"), bench.undisturbed()
    with small_disk(bench, row) as disk:
        if disk is not None:
            workdir, log = disk / "run", bench.new().with_suffix(".log")
            start(workdir, OFTEN, log=log).finish()
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            process = start(workdir, OFTEN, log=log)
            if (found := process.end()) != 0 or "Traceback" in process.output():
                row.fail(f"status {found}: {process.output()[-200:]}")
            row.count(workdir, undisturbed)
    yield row


FAULTS = {
    "one_workdir": one_workdir,
    "terminal": terminal,
    "full_files": full_files,
    "read_only": read_only,
}
