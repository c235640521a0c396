"""m2mKD on real images in minutes: does distilling modules help the network that they are assembled
to?

Runs the whole pipeline on scikit-learn's digits (the last 360 are the test set, by other writers
than the rest) for a V-MoE, distils the same teacher into a NAC, and trains both networks from
scratch with the same end-to-end budgets, for several seeds; prints one table. The NAC is tested on
renditions of the digits as well (OOD). Started again, it goes on where it stopped.

    python tools/demo.py --workdir runs/demo
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

from common_jax.metrics import read_metrics
from common_jax.report import Table, overlay, write_report

CONFIGS = {"V-MoE": "configs/m2mkd/digits.py", "NAC": "configs/m2mkd/digits_nac.py"}
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


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of the demo.

    Attributes:
      student: a key of CONFIGS.
      phase: of the config.
      seed: of the run.
      teacher: the run whose meta model and teacher it takes; None where it trains them or needs
        none.
    """

    student: str
    phase: str
    seed: int
    teacher: str | None = None


def main() -> None:
    flags = parse_flags()
    start = time.time()
    run_all(plan(flags.seeds), flags, start)
    report = summarise(flags.workdir, flags.seeds)
    print(f"\n{report.resolve()}   ({time.time() - start:.0f} s)")


def plan(seeds: int) -> dict[str, Job]:
    """The runs by name. The first pipeline compiles what the later ones find in the cache, and so
    has the start."""
    jobs = {"vmoe_m2mkd_0": Job("V-MoE", "pipeline", 0)}
    jobs |= {f"vmoe_scratch_{seed}": Job("V-MoE", "end_to_end", seed) for seed in range(seeds)}
    jobs |= {f"vmoe_m2mkd_{seed}": Job("V-MoE", "pipeline", seed) for seed in range(1, seeds)}
    for seed in range(seeds):
        jobs[f"nac_scratch_{seed}"] = Job("NAC", "end_to_end", seed)
        jobs[f"nac_m2mkd_{seed}"] = Job("NAC", "pipeline", seed, teacher=f"vmoe_m2mkd_{seed}")
    return jobs


def run_all(jobs: dict[str, Job], flags: argparse.Namespace, start: float) -> None:
    """Runs the jobs, `flags.jobs` at a time and each after its teacher, with their output in
    WORKDIR/NAME.log; exits at the first failure."""
    waiting, running, done = dict(jobs), {}, {None}
    while waiting or running:
        for name in [name for name, job in waiting.items() if job.teacher in done]:
            if len(running) < flags.jobs:
                core = min(set(range(flags.jobs)) - {core for _, core in running.values()})
                running[name] = start_run(name, waiting.pop(name), flags, core), core
        time.sleep(0.2)
        for name, (process, _) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            done.add(name)
            if process.returncode != 0:
                for other, _ in running.values():
                    other.terminate()
                sys.exit(f"{name} failed; see {flags.workdir / name}.log")
            print(f"{time.time() - start:5.0f} s  {name} done", flush=True)


def start_run(name: str, job: Job, flags: argparse.Namespace, core: int) -> subprocess.Popen:
    """One run in a process of its own, on one core."""
    workdir = flags.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    config = f"{CONFIGS[job.student]}:phase={job.phase}"
    command = [sys.executable, "-m", "m2mkd_jax.main", f"--config={config}"]
    command += [f"--config.seed={job.seed}", f"--workdir={workdir / name}"]
    if job.teacher is not None:
        command += [
            f"--config.sources.{role}={workdir / job.teacher / role}"
            for role in ("meta", "teacher")
        ]
    command += flags.flags
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
    teachers = [result(workdir / f"vmoe_m2mkd_{seed}" / "teacher") for seed in range(seeds)]
    rows = [("teacher", "", mean_and_spread(teachers, "test/accuracy"), "")]
    figures = []
    for student in CONFIGS:
        short = student.replace("-", "").lower()
        groups = {
            "from scratch": [workdir / f"{short}_scratch_{seed}" for seed in range(seeds)],
            "with m2mKD": [workdir / f"{short}_m2mkd_{seed}/end_to_end" for seed in range(seeds)],
        }
        curves = {name: [accuracy_curve(run) for run in runs] for name, runs in groups.items()}
        for name, runs in groups.items():
            early = [{"test/accuracy": curve[0][1]} for curve in curves[name]]
            results = [result(run) for run in runs]
            rows.append(
                (
                    f"{student}, {name}",
                    mean_and_spread(early, "test/accuracy"),
                    mean_and_spread(results, "test/accuracy"),
                    mean_and_spread(results, "ood/accuracy"),
                )
            )
        steps = {(c[0][0], c[-1][0]) for group in curves.values() for c in group}
        assert len(steps) == 1, steps
        picture = workdir / f"accuracy_{short}.png"
        overlay(curves, label="test accuracy", path=picture)
        figures.append((f"Test accuracy of the {student}, end to end, {seeds} seeds", picture))
    graph = workdir / "nac_m2mkd_0" / "end_to_end" / "connectivity.png"
    figures.append(("The mediators of the NAC before and after training, seed 0", graph))
    header = ("digits", "after 2 epochs", "at the end", "OOD, at the end")
    table = Table(f"Accuracy, mean ± standard deviation over {seeds} seeds", header, tuple(rows))
    print(f"\n{table.caption}\n")
    for row in (header, *rows):
        print("  " + "".join(cell.ljust(24) for cell in row).rstrip())
    return write_report(workdir, title="m2mKD on digits", table=table, figures=figures)


def accuracy_curve(run: pathlib.Path) -> list[tuple[int, float]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line["test/accuracy"]) for line in lines if "test/accuracy" in line]


def result(run: pathlib.Path) -> dict[str, float]:
    return json.loads((run / "result.json").read_text())


def mean_and_spread(results: list[dict[str, float]], metric: str) -> str:
    """Empty where the runs did not measure it."""
    values = [result[metric] for result in results if metric in result]
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f} %"


if __name__ == "__main__":
    main()
