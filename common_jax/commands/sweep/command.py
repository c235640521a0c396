"""Runs a config for every setting of a grid and several seeds, and makes one table of them.

A key of the grid is a config field, as after --config., or an argument of the config file after a
colon: ':prior=ring,none'. Commas in brackets belong to a value: 'model.depths=(1,1),(2,2)'. Without
--grid, the cells come from the config file's sweep(), which yields one dict per cell, such as
{"optim.lr": 1e-3} or {":prior": "ring"}. Any --config.FIELD=VALUE applies to all cells.

All cells are checked before any is started. When the command is run again, finished runs are
skipped, unfinished ones resume, and failed ones are retried. More values or seeds in the same
folder add to the runs there. DIR/sweep.json has the settings, DIR/NAME and DIR/NAME.log are the
runs, and sweep.csv, sweep.md and sweep.png in DIR are the table and the plot of the finished runs.

Exit status: 0 if all runs are finished, 1 if some are not, 2 if nothing could be started or no run
has the metric, or 128 plus the number of a signal that was passed on to the runs.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from common_jax.checkpoint import absolute, refuse_pattern
from common_jax.commands.arguments import count
from common_jax.commands.choice import choose
from common_jax.commands.sweep.cells import (
    Cell,
    Programs,
    parse_grid,
    plan_cells,
    read_sweep,
)
from common_jax.commands.sweep.emit import format_commands, format_slurm, format_xpk
from common_jax.commands.sweep.jobs import Job, Outcome, describe, run_each, show
from common_jax.commands.sweep.table import (
    Row,
    missing_metrics,
    read_results,
    sort_rows,
    write_table,
)
from common_jax.config import freeze
from common_jax.signals import STATUSES, ends_quietly
from common_jax.workdir import (
    check_output,
    describe_error,
    hold,
    holds_results,
    in_bucket,
    read_json,
    refuse_other_config,
    write_json,
)

FIELDS = {"cells": dict, "keys": list, "seeds": int}  # of sweep.json
FORMS = {"commands": format_commands, "slurm": format_slurm, "xpk": format_xpk}


@dataclasses.dataclass(frozen=True)
class Run:
    """A cell with one seed.

    Attributes:
      name: name of its folder and its log.
      cell: the cell that it belongs to.
      seed: seeds everything random.
      command: arguments for python, without the workdir.
    """

    name: str
    cell: Cell
    seed: int
    command: tuple[str, ...]

    @classmethod
    def of(cls, cell: Cell, seed: int) -> "Run":
        """The run of a cell with a seed."""
        return cls(f"{cell.name},seed={seed}", cell, seed, (*cell.command, f"--config.seed={seed}"))

    def results(self, workdir: epath.Path) -> dict[str, float] | None:
        """Its metrics, read below the sweep's folder; None until it is finished."""
        return read_results(workdir / self.name, self.cell, self.seed)


def parse_flags(
    argv: Sequence[str] | None, programs: Programs, *, example: str = "", name: str | None = None
) -> argparse.Namespace:
    """Parses the flags. The result also has `programs`, and in `common` all --config.FIELD=VALUE
    flags."""
    parser = argparse.ArgumentParser(
        prog=name,
        description=f"{__doc__}{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="FILE.py, or FILE.py:ARGUMENT=VALUE,...")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--grid", help="KEY=VALUE,VALUE;KEY=VALUE,VALUE")
    parser.add_argument("--seeds", type=count, default=1, help="runs per cell, seeds from 0")
    parser.add_argument(
        "--jobs",
        type=count,
        help="runs at a time, by default 1; on a CPU several share the cores, but on an "
        "accelerator they would get in each other's way",
    )
    parser.add_argument(
        "--metric",
        help="one or more to compare, NAME,NAME; by default "
        + " or ".join(program.metric for program in programs.values())
        + "; for a metric of an earlier run in a pipeline, give its folder too, FOLDER/NAME",
    )
    parser.add_argument(
        "--emit",
        choices=(*FORMS, "table"),
        help="run nothing, but print commands for the unfinished runs: one per line, a script for "
        "sbatch, or a script of xpk commands; or make only the table",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags, common = parser.parse_known_args(argv)
    if unknown := [flag for flag in common if not flag.startswith("--config.")]:
        parser.error(f"arguments {unknown} are not understood; write --config.FIELD=VALUE")
    flags.common, flags.programs = common, programs
    return flags


@ends_quietly
def main(
    argv: Sequence[str] | None, programs: Programs, example: str = "", name: str | None = None
) -> int:
    """Runs the command; returns its exit status.

    Args:
      argv: the arguments; by default the process's.
      programs: the programs that may run the configs.
      example: an example command for --help.
      name: the command's name, as a user types it; by default the process's.
    """
    flags = parse_flags(argv, programs, example=example, name=name)
    try:
        return sweep(flags)
    except (ValueError, OSError) as error:
        if flags.debug:
            raise
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2


def sweep(flags: argparse.Namespace) -> int:
    """Checks everything, then runs or prints the unfinished runs, and makes the table.

    Raises:
      ValueError: if the sweep, or any of its runs, cannot start.
      OSError: among others, if another process runs a sweep in the same folder.
    """
    workdir = absolute(flags.workdir)
    check_output("--workdir", workdir)
    # Making only the table is safe while a sweep runs.
    with contextlib.nullcontext() if flags.emit == "table" else hold(workdir):
        return _sweep(flags, workdir)


def _sweep(flags: argparse.Namespace, workdir: epath.Path) -> int:
    cells, asked, record = plan(flags, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if flags.emit != "table":  # which holds no lock: another process may run this sweep
        write_json(workdir / "sweep.json", record)
        write_json(workdir / "config.json", cells[0].config)  # later starts are compared to it
    runs = [Run.of(cell, seed) for seed in range(flags.seeds) for cell in asked]
    left = [run for run in runs if run.results(workdir) is None]
    emits = flags.emit in FORMS
    counts = f"{len(runs) - len(left)} finished, {len(left)} to go"
    stream = sys.stderr if emits else sys.stdout
    print(f"{len(asked)} cells, {len(runs)} runs: {counts}", file=stream, flush=True)
    if emits:
        commands = {run.name: run.command for run in left}
        print(FORMS[flags.emit](commands, workdir, at_a_time=flags.jobs), end="")
        return 0
    outcome = Outcome({}, None)
    if flags.emit is None and left:
        jobs = {run.name: Job(run.command) for run in left}
        outcome = run_each(jobs, pathlib.Path(workdir), at_a_time=flags.jobs or 1)
    wrong = make_table(flags, workdir, cells, record)
    unfinished = [run.name for run in left if run.results(workdir) is None]
    report(unfinished, outcome, workdir)
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
    if outcome.signal is not None:
        return 128 + outcome.signal
    return 1 if unfinished else 2 if wrong else 0


def plan_asked(flags: argparse.Namespace) -> list[Cell]:
    """The cells of --grid, or of the config's own sweep()."""
    settings = read_sweep(flags.config) if flags.grid is None else parse_grid(flags.grid)
    return plan_cells(flags.config, flags.common, settings, flags.programs)


def plan(
    flags: argparse.Namespace, workdir: epath.Path
) -> tuple[list[Cell], list[Cell], dict[str, Any]]:
    """Returns all cells in the folder, including those of earlier starts; the requested ones; and
    the content of sweep.json. Writes nothing.

    Raises:
      ValueError: for cells that cannot run, and for a folder that holds something else.
    """
    if in_bucket(workdir) and flags.emit is None:
        raise ValueError(f"--workdir={workdir}: give a local folder to run here, or --emit")
    refuse_pattern(flags.workdir, "--workdir")
    asked = plan_asked(flags)
    record, keys = workdir / "sweep.json", list(asked[0].values)
    before = read_json(record, FIELDS) if record.exists() else {"cells": {}, "seeds": 0}
    if not record.exists() and (workdir / "config.json").exists():
        raise ValueError(f"--workdir={workdir} holds a run, not a sweep; give another one")
    found = {}
    if before["cells"] and holds_results(workdir):
        if set(before["keys"]) != set(keys):
            raise ValueError(
                f"--workdir={workdir} holds a sweep of {before['keys']}, and this is one of "
                f"{keys}; give another --workdir"
            )
        keys = before["keys"]
        settings = before["cells"].values()
        earlier = plan_cells(flags.config, flags.common, settings, flags.programs)
        config = earlier[0].config
        program = choose(config, flags.programs)
        refuse_other_config(workdir, freeze(program.config, config))
        found = {cell.name: cell for cell in earlier}
    cells = list((found | {cell.name: cell for cell in asked}).values())
    content = {
        "config": flags.config,
        "flags": flags.common,
        "keys": keys,
        "seeds": max(flags.seeds, before["seeds"]),
        "cells": {cell.name: {key: cell.values[key] for key in keys} for cell in cells},
    }
    return cells, asked, content


def make_table(
    flags: argparse.Namespace,
    workdir: epath.Path,
    cells: Sequence[Cell],
    record: Mapping[str, Any],
) -> str:
    """Writes and prints the table of all cells of a `record` that `plan` returned; returns what is
    wrong with --metric, or ""."""
    rows = []
    for cell in cells:
        found = (Run.of(cell, seed).results(workdir) for seed in range(record["seeds"]))
        values = {key: cell.values[key] for key in record["keys"]}
        rows.append(Row(values, [result for result in found if result is not None]))
    program = choose(cells[0].config, flags.programs)
    metrics = (flags.metric or program.metric).split(",")
    show(write_table(workdir, sort_rows(rows), metrics))
    print(f"\n{workdir / 'sweep.md'}, sweep.csv, sweep.png", flush=True)
    return missing_metrics(rows, metrics)


def report(unfinished: Sequence[str], outcome: Outcome, workdir: epath.Path) -> None:
    """Prints which runs are not finished, and how each ended."""
    if not unfinished:
        return
    print(f"\nNot finished: {len(unfinished)}; the same command resumes them.")
    for name in unfinished:
        if name not in outcome.statuses:
            print(f"  {name}  not started")
            continue
        status = outcome.statuses[name]
        stopped = status in STATUSES.values()
        text = "stopped early" if stopped else describe(status)
        print(f"  {name}  {text}; see {workdir / name}.log")
    sys.stdout.flush()
