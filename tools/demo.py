"""m2mKD on real images in minutes: does distilling modules help the V-MoE that they are assembled
to?

Runs the whole pipeline on scikit-learn's digits (the last 360 are the test set, by other writers
than the rest) and the same V-MoE from scratch with the same end-to-end budget, for several seeds,
and prints one table. Started again, it goes on where it stopped.

    python tools/demo.py --workdir runs/demo
"""

import argparse
import collections
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

from common_jax.metrics import read_metrics
from common_jax.report import Table, overlay, write_report

CONFIG = "configs/m2mkd/digits.py"
ROOT = pathlib.Path(__file__).resolve().parent.parent


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of everything")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("flags", nargs="*", help="more flags of every run, such as --config.x=1")
    return parser.parse_args()


def main() -> None:
    flags = parse_flags()
    start = time.time()
    # The first pipeline compiles what the later ones find in the cache; it has the start.
    jobs = {"m2mkd_0": ("pipeline", 0)}
    jobs |= {f"scratch_{seed}": ("end_to_end", seed) for seed in range(flags.seeds)}
    jobs |= {f"m2mkd_{seed}": ("pipeline", seed) for seed in range(1, flags.seeds)}
    run_all(jobs, flags, start)
    report = summarise(flags.workdir, flags.seeds)
    print(f"\n{report.resolve()}   ({time.time() - start:.0f} s)")


def run_all(jobs: dict[str, tuple[str, int]], flags: argparse.Namespace, start: float) -> None:
    """Runs the jobs, `flags.jobs` at a time, each with its output in WORKDIR/NAME.log; exits at
    the first failure."""
    waiting, running = collections.deque(jobs.items()), {}
    while waiting or running:
        while waiting and len(running) < flags.jobs:
            name, (phase, seed) = waiting.popleft()
            core = min(set(range(flags.jobs)) - {core for _, core in running.values()})
            running[name] = start_run(name, phase, seed, flags, core), core
        time.sleep(0.2)
        for name, (process, _) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode != 0:
                for other, _ in running.values():
                    other.terminate()
                sys.exit(f"{name} failed; see {flags.workdir / name}.log")
            print(f"{time.time() - start:5.0f} s  {name} done", flush=True)


def start_run(
    name: str, phase: str, seed: int, flags: argparse.Namespace, core: int
) -> subprocess.Popen:
    """One run in a process of its own, on one core."""
    flags.workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "m2mkd_jax.main", f"--config={CONFIG}:phase={phase}"]
    command += [
        f"--config.seed={seed}",
        f"--workdir={(flags.workdir / name).resolve()}",
        *flags.flags,
    ]
    with open(flags.workdir / f"{name}.log", "a") as log:
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


def summarise(workdir: pathlib.Path, seeds: int) -> pathlib.Path:
    """Prints the table and writes the report over all runs; returns its path."""
    curves = {
        "from scratch": [accuracy_curve(workdir / f"scratch_{seed}") for seed in range(seeds)],
        "with m2mKD": [
            accuracy_curve(workdir / f"m2mkd_{seed}" / "end_to_end") for seed in range(seeds)
        ],
    }
    teachers = [accuracy(workdir / f"m2mkd_{seed}" / "teacher") for seed in range(seeds)]
    rows = [("teacher", "", mean_and_spread(teachers))]
    for name, group in curves.items():
        tenths = [curve[0][1] for curve in group]
        ends = [curve[-1][1] for curve in group]
        rows.append((name, mean_and_spread(tenths), mean_and_spread(ends)))
    steps = {(curve[0][0], curve[-1][0]) for group in curves.values() for curve in group}
    assert len(steps) == 1, steps
    first, last = steps.pop()
    header = ("V-MoE on digits", f"after {first} of {last} steps", "at the end")
    table = Table(
        f"Test accuracy, mean ± standard deviation over {seeds} seeds", header, tuple(rows)
    )
    print(f"\n{table.caption}\n")
    for row in (header, *rows):
        print("  " + "".join(cell.ljust(24) for cell in row).rstrip())
    picture = workdir / "accuracy.png"
    overlay(curves, label="test accuracy", path=picture)
    return write_report(
        workdir,
        title="m2mKD on digits",
        table=table,
        figures=((f"Test accuracy of the V-MoE, end to end, {seeds} seeds", picture),),
    )


def accuracy_curve(run: pathlib.Path) -> list[tuple[int, float]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line["test/accuracy"]) for line in lines if "test/accuracy" in line]


def accuracy(run: pathlib.Path) -> float:
    return json.loads((run / "result.json").read_text())["test/accuracy"]


def mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f} %"


if __name__ == "__main__":
    main()
