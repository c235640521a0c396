"""Compares m2mKD with other ways to train on CIFAR-10, by accuracy and cost.

Trains a teacher module by module, then a V-MoE and a NAC from scratch, with logit distillation from
the whole teacher, and with m2mKD. Also trains the V-MoE with m2mKD at other weights (alpha), with a
KL divergence averaged over the batch only, with its stitches kept, and, for --long-steps updates,
from scratch and with m2mKD. All others train end to end for the same number of steps. Prints one
table over several seeds, including the total cost of all phases, and writes curves. Run it again to
resume an interrupted comparison.

    python tools/compare_m2mkd.py --workdir runs/cifar10 --data /data/cifar10 --per-class 500

DATA is a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or train.zip and test.zip of these.
"""

import argparse
import dataclasses
import functools
import pathlib
import time

import jax

from common_jax.commands.arguments import count, natural
from common_jax.commands.plan.steps import step_flops
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
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.report import Table, write_report
from common_jax.report.draw import overlay
from common_jax.signals import ends_quietly
from common_jax.workdir import freeze_stored, read_json
from m2mkd_jax.config import Config
from m2mkd_jax.curves import CURVES
from m2mkd_jax.phases.pipeline import describe

CONFIGS = {"vmoe": "configs/m2mkd/cifar10_vmoe.py", "nac": "configs/m2mkd/cifar10_nac.py"}
TEACHER = "vmoe_m2mkd"  # its pipeline trains the meta model and teacher that the others use


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train a student: a row of the table.

    Attributes:
      row: label in the table.
      phase: "pipeline" for all phases that `takes` does not supply, or "end_to_end".
      takes: TEACHER's runs to start from: "meta", "teacher", "students".
      flags: further overrides of the config.
      long: whether it trains for --long-steps updates.
    """

    row: str
    phase: str = "pipeline"
    takes: tuple[str, ...] = ("meta", "teacher")
    flags: tuple[str, ...] = ()
    long: bool = False


LOGITS = ("--config.baseline.kind=soft",)
VARIANTS = {
    TEACHER: Variant("V-MoE, m2mKD (alpha 0.5, stitches dropped)", takes=()),
    "vmoe_scratch": Variant("V-MoE from scratch", "end_to_end", ()),
    "vmoe_logits": Variant("V-MoE, logit distillation", "end_to_end", ("teacher",), LOGITS),
    "vmoe_kept": Variant(
        "V-MoE, m2mKD, stitches kept",
        "end_to_end",
        ("students",),
        ("--config.model.stitches=kept",),
    ),
    "vmoe_alpha_0": Variant("V-MoE, m2mKD, alpha 0", flags=("--config.distill.alpha=0.0",)),
    "vmoe_alpha_0.9": Variant("V-MoE, m2mKD, alpha 0.9", flags=("--config.distill.alpha=0.9",)),
    "vmoe_batch_mean": Variant(
        "V-MoE, m2mKD, KL averaged over the batch", flags=("--config.distill.kind=soft_batch_mean",)
    ),
    "vmoe_long": Variant("V-MoE from scratch, longer", "end_to_end", (), long=True),
    "vmoe_m2mkd_long": Variant("V-MoE, m2mKD, longer", "end_to_end", ("students",), long=True),
    "nac_scratch": Variant("NAC from scratch", "end_to_end", ()),
    "nac_logits": Variant("NAC, logit distillation", "end_to_end", ("teacher",), LOGITS),
    "nac_m2mkd": Variant("NAC, m2mKD"),
}


def parse_flags() -> argparse.Namespace:
    parser = demo_parser(__doc__, workdir="runs/cifar10", seeds=1)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--per-class", type=natural, default=0, help="images per class; 0 for all")
    parser.add_argument("--long-steps", type=count, default=1326, help="updates of the longer runs")
    parser.add_argument(
        "--one-teacher", action="store_true", help="train meta model and teacher for one seed only"
    )
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows to train"
    )
    flags = parse_demo(parser)
    if not flags.data.is_dir():
        parser.error(f"--data={flags.data} is not a folder")
    return flags


@ends_quietly
def main() -> None:
    flags = parse_flags()
    start = time.time()
    run_all(plan(flags), flags.workdir, at_a_time=flags.jobs)
    report = summarise(flags)
    print(f"\n{report.resolve()}   ({time.time() - start:.0f} s)")


def chosen(flags: argparse.Namespace) -> list[str]:
    """The variants to train: those in --only, and TEACHER if any of them needs it."""
    needed = any(VARIANTS[name].takes for name in flags.only)
    return [name for name in VARIANTS if name in flags.only or (name == TEACHER and needed)]


def plan(flags: argparse.Namespace) -> dict[str, Job]:
    """The runs by name, ordered by seed."""
    return {
        f"{name}_{seed}": job(flags, name, seed)
        for seed in range(flags.seeds)
        for name in chosen(flags)
    }


def job(flags: argparse.Namespace, name: str, seed: int) -> Job:
    variant = VARIANTS[name]
    # For each source, the pipeline that made it; with one teacher, all seeds share the first's.
    first = f"{TEACHER}_{0 if flags.one_teacher else seed}"
    made_by = {"meta": first, "teacher": first, "students": f"{TEACHER}_{seed}"}
    takes = variant.takes
    if name == TEACHER and first != f"{name}_{seed}":
        takes = ("meta", "teacher")
    settings = {
        "seed": seed,
        "data.path": flags.data.resolve(),
        "data.per_class": flags.per_class,
        "data.test_per_class": 500,
    }
    if variant.long:
        settings["optim.steps"] = flags.long_steps
    for role in takes:
        made = flags.workdir.resolve() / made_by[role] / role
        settings[f"sources.{role}"] = (str(made),) if role == "students" else made
    config = f"--config={CONFIGS[name.split('_')[0]]}:phase={variant.phase}"
    own = [f"--config.{key}={value}" for key, value in settings.items()]
    command = ("-m", "m2mkd_jax.main", config, *own, *variant.flags, *flags.flags)
    return Job(command, made_by[takes[0]] if takes else None)


def summarise(flags: argparse.Namespace) -> pathlib.Path:
    """Prints the table, writes the report on all runs, and returns its path."""
    header = ("CIFAR-10", "test accuracy", "seeds", "training, TFLOP")
    rows, curves = [], {}
    for name in ["teacher", *chosen(flags)]:
        made_by = ("teacher",) if name == "teacher" else VARIANTS[name].takes
        label = "teacher (ViT)" if name == "teacher" else VARIANTS[name].row
        ends = [folder for seed in range(flags.seeds) if (folder := end(flags.workdir, name, seed))]
        if not ends:
            continue
        accuracy = mean_and_spread([accuracies(run) for run in ends], "test/accuracy", unit=" %")
        given = flags.workdir / f"{TEACHER}_0"
        folders = [given / run for run in {run for role in made_by for run in MADE_BY[role]}]
        if name != "teacher":
            folders += [path.parent for path in (flags.workdir / f"{name}_0").rglob("result.json")]
        operations = sum(run_flops(folder) for folder in folders) / 1e12
        rows.append((label, accuracy, str(len(ends)), f"{operations:.1f}"))
        if name != "teacher":
            curves[label] = [read_curve(run, "test/accuracy") for run in ends]
    picture = flags.workdir / "accuracy.png"
    overlay(curves, label="test accuracy", path=picture)
    table = Table("Mean ± sample standard deviation over seeds", header, tuple(rows))
    show(table)
    figures = [("Test accuracy, end to end", picture)]
    return write_report(
        flags.workdir, title="m2mKD on CIFAR-10", table=table, figures=figures, families=CURVES
    )


def end(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path | None:
    """The folder of a row's final run; None until that run is finished."""
    if name == "teacher":
        folder = workdir / f"{TEACHER}_{seed}" / "teacher"
    else:
        folder = workdir / f"{name}_{seed}"
        folder = folder / "end_to_end" if VARIANTS[name].phase == "pipeline" else folder
    return folder if (folder / "result.json").exists() else None


# For each source of a run, the folders of TEACHER's pipeline whose training produced it.
MADE_BY = {
    "meta": ("meta",),
    "teacher": ("meta", "modules", "teacher"),
    "students": ("meta", "modules", "teacher", "students"),
}


@functools.cache
def run_flops(folder: pathlib.Path) -> float:
    """FLOPs of the matrix products and convolutions in all of a run's updates, as counted by
    `plan.steps.step_flops`."""
    config = freeze_stored(Config, read_json(folder / "config.json"), folder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    task = describe(config, mesh).task(steps_per_epoch=1)
    return step_flops(task, config.optim).model * read_json(folder / "result.json")["steps"]


if __name__ == "__main__":
    main()
