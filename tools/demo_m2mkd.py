"""m2mKD on real images in minutes: does module distillation help the assembled network?

Runs the whole pipeline on scikit-learn's digits (the last 360, by different writers than the rest,
are the test set) for a V-MoE, distils the same teacher into a NAC, and trains both networks from
scratch with the same end-to-end budgets, for several seeds. Prints one table. The NAC is also
tested on renditions of the digits (OOD). Run it again to resume an interrupted demo.

    python tools/demo_m2mkd.py --workdir runs/demo/m2mkd
"""

import argparse
import pathlib
import time

from common_jax.commands.sweep.jobs import (
    Job,
    accuracies,
    demo_parser,
    mean_and_spread,
    read_curve,
    run_all,
    show,
)
from common_jax.report import Table, overlay, write_report
from common_jax.signals import ends_quietly
from m2mkd_jax.curves import CURVES

CONFIGS = {"V-MoE": "configs/m2mkd/digits.py", "NAC": "configs/m2mkd/digits_nac.py"}


@ends_quietly
def main() -> None:
    flags = demo_parser(__doc__, workdir="runs/demo/m2mkd", seeds=3).parse_args()
    start = time.time()
    run_all(plan(flags), flags.workdir, at_a_time=flags.jobs)
    report = summarise(flags.workdir, flags.seeds)
    print(f"\n{report.resolve()}   ({time.time() - start:.0f} s)")


def plan(flags: argparse.Namespace) -> dict[str, Job]:
    """The runs by name.

    The first pipeline starts first, since it compiles what the later ones find in the cache. A NAC
    uses the meta model and teacher of the V-MoE's pipeline.
    """

    def job(student: str, phase: str, seed: int, teacher: str | None = None) -> Job:
        command = ["-m", "m2mkd_jax.main", f"--config={CONFIGS[student]}:phase={phase}"]
        command += [f"--config.seed={seed}", *flags.flags]
        if teacher is not None:
            folder = flags.workdir.resolve() / teacher
            command += [f"--config.sources.{role}={folder / role}" for role in ("meta", "teacher")]
        return Job(tuple(command), teacher)

    jobs = {"vmoe_m2mkd_0": job("V-MoE", "pipeline", 0)}
    jobs |= {
        f"vmoe_scratch_{seed}": job("V-MoE", "end_to_end", seed) for seed in range(flags.seeds)
    }
    jobs |= {f"vmoe_m2mkd_{seed}": job("V-MoE", "pipeline", seed) for seed in range(1, flags.seeds)}
    for seed in range(flags.seeds):
        jobs[f"nac_scratch_{seed}"] = job("NAC", "end_to_end", seed)
        jobs[f"nac_m2mkd_{seed}"] = job("NAC", "pipeline", seed, f"vmoe_m2mkd_{seed}")
    return jobs


def summarise(workdir: pathlib.Path, seeds: int) -> pathlib.Path:
    """Prints the table, writes the report on all runs, and returns its path."""
    teachers = [accuracies(workdir / f"vmoe_m2mkd_{seed}" / "teacher") for seed in range(seeds)]
    rows = [("teacher", "", mean_and_spread(teachers, "test/accuracy", unit=" %"), "")]
    figures = []
    for student in CONFIGS:
        short = student.replace("-", "").lower()
        groups = {
            "from scratch": [workdir / f"{short}_scratch_{seed}" for seed in range(seeds)],
            "with m2mKD": [workdir / f"{short}_m2mkd_{seed}/end_to_end" for seed in range(seeds)],
        }
        curves = {
            name: [read_curve(run, "test/accuracy") for run in runs]
            for name, runs in groups.items()
        }
        for name, runs in groups.items():
            early = [{"test/accuracy": 100 * curve[0][1]} for curve in curves[name]]
            results = [accuracies(run) for run in runs]
            rows.append(
                (
                    f"{student}, {name}",
                    mean_and_spread(early, "test/accuracy", unit=" %"),
                    mean_and_spread(results, "test/accuracy", unit=" %"),
                    mean_and_spread(results, "ood/accuracy", unit=" %"),
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
    show(table)
    return write_report(
        workdir, title="m2mKD on digits", table=table, figures=figures, families=CURVES
    )


if __name__ == "__main__":
    main()
