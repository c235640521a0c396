"""m2mKD on real images in minutes: does module distillation help the assembled network?

Runs the whole pipeline on scikit-learn's digits (the test set is the last 360, by writers who wrote
none of the others) for a V-MoE, distils the same teacher into a NAC, and trains both networks from
scratch with the same end-to-end budgets, for one seed or several. Prints the table's V-MoE rows
first, then the whole table. The NAC is also tested on renditions of the digits (OOD). At the end a
trained network classifies some test digits. Run it again to resume an interrupted demo.

    python tools/demo_m2mkd.py --workdir runs/demo/m2mkd
"""

import argparse
import pathlib
import shlex
import time
from collections.abc import Collection

from PIL import Image
from use import show_use

from common_jax.commands.sweep.jobs import (
    Job,
    accuracies,
    demo_parser,
    mean_and_spread,
    parse_demo,
    read_curve,
    run_all,
    show,
)
from common_jax.report import Table, write_report
from common_jax.report.draw import overlay
from common_jax.signals import ends_quietly
from m2mkd_jax.curves import CURVES
from m2mkd_jax.data import digits

CONFIGS = {"V-MoE": "configs/m2mkd/digits.py", "NAC": "configs/m2mkd/digits_nac.py"}
HEADER = ("digits", "after 2 epochs", "at the end", "OOD, at the end")
PICTURES = 6  # test digits that a network classifies


@ends_quietly
def main() -> None:
    flags = parse_demo(demo_parser(__doc__, workdir="runs/demo/m2mkd", seeds=1))
    start, done = time.time(), set()

    def after(name: str) -> None:
        done.add(name)
        show_progress(flags.workdir, name, done)

    run_all(plan(flags), flags.workdir, at_a_time=flags.jobs, after_each=after)
    finish(flags, start)


def finish(flags: argparse.Namespace, start: float) -> None:
    """Shows the results of all runs and a network's predictions for some digits; `start` is when
    the demo began."""
    report = summarise(flags.workdir, flags.seeds)
    print(f"\n{report.resolve()}   ({time.time() - start:.0f} s)")
    run, pictures = flags.workdir / "vmoe_m2mkd_0" / "end_to_end", flags.workdir / "digits"
    write_digits(pictures)
    show_use("m2mkd", "predict", str(run), str(pictures), "--top=2")


def plan(flags: argparse.Namespace) -> dict[str, Job]:
    """The jobs by name.

    A NAC uses the meta model and teacher of the V-MoE with the same seed. Pipelines of other seeds
    start once the first is finished, to reuse its programs from the compilation cache.
    """

    def line(student: str, name: str, seed: int) -> str:
        phase = "pipeline" if name == "m2mkd" else "end_to_end"
        command = [run_name(student, name, seed), f"--config={CONFIGS[student]}:phase={phase}"]
        command += [f"--config.seed={seed}", *flags.flags]
        if (student, name) == ("NAC", "m2mkd"):
            folder = flags.workdir.resolve() / run_name("V-MoE", name, seed)
            command += [f"--config.sources.{role}={folder / role}" for role in ("meta", "teacher")]
        return shlex.join(command)

    def in_turn(*lines: str) -> tuple[str, ...]:
        return ("tools/in_turn.py", "m2mkd_jax.main", *lines)

    seeds = range(flags.seeds)
    scratch = in_turn(*(line(x, "scratch", seed) for x in CONFIGS for seed in seeds))
    teacher = flags.workdir / run_name("V-MoE", "m2mkd", 0) / "teacher" / "result.json"
    jobs = {
        "first": Job(in_turn(line("V-MoE", "m2mkd", 0))),
        "scratch": Job(scratch),
        "first_nac": Job(in_turn(line("NAC", "m2mkd", 0)), file=teacher),
    }
    for seed in seeds[1:]:
        lines = (line(x, "m2mkd", seed) for x in CONFIGS)
        jobs[f"seed_{seed}"] = Job(in_turn(*lines), needs="first")
    return jobs


def show_progress(workdir: pathlib.Path, name: str, done: Collection[str]) -> None:
    """Prints the accuracies of the first seed's V-MoE once both jobs that train it are done; `name`
    has just been added to `done`."""
    pair = {"first", "scratch"}
    if name in pair and pair <= set(done):
        rows = [teacher_row(workdir, 1), *student_rows(workdir, "V-MoE", 1)]
        show(Table("The V-MoE's accuracy, first seed", HEADER[:3], tuple(r[:3] for r in rows)))
        print(flush=True)


def run_name(student: str, name: str, seed: int) -> str:
    """The folder of a run, such as vmoe_scratch_0."""
    return f"{student.replace('-', '').lower()}_{name}_{seed}"


def write_digits(folder: pathlib.Path) -> None:
    """Writes some test images as PNG, each named by its index in the set and its digit."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = digits.load_split("test")
    for place in range(0, len(images), len(images) // PICTURES)[:PICTURES]:
        Image.fromarray(images[place, ..., 0]).save(folder / f"{place:03}_is_{labels[place]}.png")


def summarise(workdir: pathlib.Path, seeds: int) -> pathlib.Path:
    """Prints the table, writes the report on all runs, and returns its path."""
    rows, figures = [teacher_row(workdir, seeds)], []
    for student in CONFIGS:
        rows += student_rows(workdir, student, seeds)
        curves = curves_of(workdir, student, seeds)
        steps = {(c[0][0], c[-1][0]) for group in curves.values() for c in group}
        assert len(steps) == 1, steps
        picture = workdir / f"accuracy_{student.replace('-', '').lower()}.png"
        overlay(curves, label="test accuracy", path=picture)
        figures.append((f"Test accuracy of the {student}, end to end; seeds: {seeds}", picture))
    graph = workdir / "nac_m2mkd_0" / "end_to_end" / "connectivity.png"
    figures.append(("The mediators of the NAC before and after training, seed 0", graph))
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    table = Table(f"Accuracy{spread}", HEADER, tuple(rows))
    show(table)
    return write_report(
        workdir, title="m2mKD on digits", table=table, figures=figures, families=CURVES
    )


def teacher_row(workdir: pathlib.Path, seeds: int) -> tuple[str, ...]:
    """The row of the first `seeds` teachers."""
    runs = [workdir / run_name("V-MoE", "m2mkd", seed) / "teacher" for seed in range(seeds)]
    accuracy = mean_and_spread(list(map(accuracies, runs)), "test/accuracy", unit=" %")
    return "teacher", "", accuracy, ""


def student_rows(workdir: pathlib.Path, student: str, seeds: int) -> list[tuple[str, ...]]:
    """The rows of a student's first `seeds` networks, from scratch and with m2mKD."""
    rows = []
    for name, curves in curves_of(workdir, student, seeds).items():
        early = [{"test/accuracy": 100 * curve[0][1]} for curve in curves]
        results = list(map(accuracies, runs_of(workdir, student, seeds)[name]))
        numbers = ((early, "test"), (results, "test"), (results, "ood"))
        spreads = (mean_and_spread(x, f"{split}/accuracy", unit=" %") for x, split in numbers)
        rows.append((f"{student}, {name}", *spreads))
    return rows


def curves_of(workdir: pathlib.Path, student: str, seeds: int) -> dict[str, list]:
    """The test accuracy curves of `runs_of`."""
    return {
        name: [read_curve(run, "test/accuracy") for run in runs]
        for name, runs in runs_of(workdir, student, seeds).items()
    }


def runs_of(workdir: pathlib.Path, student: str, seeds: int) -> dict[str, list[pathlib.Path]]:
    """The end-to-end runs of a student's first `seeds` networks."""
    return {
        "from scratch": [workdir / run_name(student, "scratch", seed) for seed in range(seeds)],
        "with m2mKD": [
            workdir / run_name(student, "m2mkd", seed) / "end_to_end" for seed in range(seeds)
        ],
    }


if __name__ == "__main__":
    main()
