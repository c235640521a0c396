"""Runs of a demo: processes of their own, a few at a time, each after those it needs.

And its flags, and what it makes of results.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from common_jax.metrics import read_metrics
from common_jax.report import Table

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
      command: arguments of python, the run's workdir left out.
      needs: the run that must be finished before it starts; None where it needs none.
    """

    command: tuple[str, ...]
    needs: str | None = None


def demo_parser(description: str, *, workdir: str, seeds: int) -> argparse.ArgumentParser:
    """The flags of every demo, with these defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path(workdir))
    parser.add_argument("--seeds", type=int, default=seeds, help="repetitions of what is compared")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("flags", nargs="*", help="more flags of every run, such as --config.x=1")
    return parser


def run_all(jobs: Mapping[str, Job], workdir: pathlib.Path, *, at_a_time: int) -> None:
    """Runs the jobs by name, in order as far as their needs allow, with workdir WORKDIR/NAME and
    output in WORKDIR/NAME.log; exits at the first failure."""
    start = time.time()
    waiting, running, done = dict(jobs), {}, {None}
    while waiting or running:
        for name in [name for name, job in waiting.items() if job.needs in done]:
            if len(running) < at_a_time:
                core = min(set(range(at_a_time)) - {core for _, core in running.values()})
                running[name] = _start(waiting.pop(name), workdir, name, core), core
        time.sleep(0.2)
        for name, (process, _) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            done.add(name)
            if process.returncode != 0:
                for other, _ in running.values():
                    other.terminate()
                sys.exit(f"{name} failed; see {workdir / name}.log")
            print(f"{time.time() - start:5.0f} s  {name} done", flush=True)


def _start(job: Job, workdir: pathlib.Path, name: str, core: int) -> subprocess.Popen:
    """One run in a process of its own, on one core."""
    workdir = workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *job.command, f"--workdir={workdir / name}"]
    with open(workdir / f"{name}.log", "a") as log:
        # Most of the time is compilation; at this level it is a fifth shorter and as fast to run.
        xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
        # Networks this small are quickest on a core each; two threads would wait for each other.
        return subprocess.Popen(
            ["taskset", "-c", str(core), *command] if shutil.which("taskset") else command,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=environment,
        )


def read_json(path: pathlib.Path) -> dict:
    """A run's result.json or scores.json."""
    return json.loads(path.read_text())


def mean_and_spread(results: Sequence[Mapping[str, float]], metric: str, *, unit: str = "") -> str:
    """`42.1 ± 9.6`, mean and, of several, sample standard deviation; empty where the runs did not
    measure it."""
    values = [result[metric] for result in results if metric in result]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}{unit}"


def read_curve(run: pathlib.Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every line of a run's metrics that has the metric."""
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line[metric]) for line in lines if metric in line]


def accuracies(run: pathlib.Path) -> dict[str, float]:
    """The accuracies of a run's last evaluation, in per cent."""
    return {
        name: 100 * value
        for name, value in read_json(run / "result.json").items()
        if name.endswith("accuracy")
    }


def show(table: Table) -> None:
    """Prints a table, its columns as wide as they must be."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(table.header))]
    print(f"\n{table.caption}\n")
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "".join(cells).rstrip())
