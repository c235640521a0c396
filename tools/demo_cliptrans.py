"""CLIPTrans on emoji in minutes: do text features, and captioning first, help translation?

Trains a small M-CLIP on pictures and their names in six languages, then three translators from
English to German with equal budgets: an mBART on the texts alone, one with features as a prefix,
and one that first learned to caption the pictures. No variant of a test emoji (skin tone, gender,
hair) is in the training set. Prints one table and a few translations. Run it again to resume an
interrupted demo.

    python tools/demo_cliptrans.py --workdir runs/demo/cliptrans
"""

import argparse
import pathlib
import time

from cliptrans_jax.config import Config
from cliptrans_jax.curves import CURVES
from cliptrans_jax.evaluators.show import picture_columns, read_translations
from cliptrans_jax.runs.scoring import with_pictures
from common_jax.checkpoint import load_config
from common_jax.commands.sweep.jobs import (
    Job,
    demo_parser,
    mean_and_spread,
    read_curve,
    run_all,
    show,
)
from common_jax.report import Table, overlay, write_report
from common_jax.signals import ends_quietly
from common_jax.workdir import freeze_stored, read_json

CONFIG = "configs/cliptrans/emoji.py"
# Row of the table -> name of its runs.
MODELS = {
    "text only": "text_only",
    "CLIPTrans without captioning": "no_captioning",
    "CLIPTrans": "cliptrans",
}
SHOWN = 8


@ends_quietly
def main() -> None:
    flags = demo_parser(__doc__, workdir="runs/demo/cliptrans", seeds=1).parse_args()
    start = time.time()
    run_all(plan(flags), flags.workdir, at_a_time=flags.jobs)
    report = summarise(flags.workdir, flags.seeds)
    print(f"\n{report.resolve()}   ({time.time() - start:.0f} s)")


def plan(flags: argparse.Namespace) -> dict[str, Job]:
    """The runs by name; all runs with features use the same M-CLIP."""
    root = flags.workdir.resolve()

    def job(arguments: str, seed: int, needs: str | None = None) -> Job:
        command = ["-m", "cliptrans_jax.main", f"--config={CONFIG}:{arguments}"]
        command += [f"--config.seed={seed}", *flags.flags]
        if needs is not None:
            command += [f"--config.sources.clip={root / needs}"]
            command += [f"--config.features={root / 'features'}"]
        return Job(tuple(command), needs)

    jobs = {"clip": job("stage=clip", 0)}
    for seed in range(flags.seeds):
        jobs[f"text_only_{seed}"] = job("model=text_only", seed)
    for seed in range(flags.seeds):
        jobs[f"cliptrans_{seed}"] = job("model=cliptrans", seed, "clip")
    for seed in range(flags.seeds):
        jobs[f"no_captioning_{seed}"] = job("model=no_captioning", seed, "clip")
    return jobs


def summarise(workdir: pathlib.Path, seeds: int) -> pathlib.Path:
    """Prints the table and translations, writes the report on all runs, and returns its path."""
    rows, curves = [], {}
    for title, name in MODELS.items():
        runs = [workdir / f"{name}_{seed}" / "translate" for seed in range(seeds)]
        scores = [read_json(run / "scores.json") for run in runs]
        numbers = [mean_and_spread(scores, metric) for metric in ("bleu", "chrf", "exact")]
        rows.append((title, *numbers[:2], f"{numbers[2]} %"))
        curves[title] = [read_curve(run, "val/chrf") for run in runs]
    steps = {curve[-1][0] for group in curves.values() for curve in group}
    assert len(steps) == 1, steps
    picture = workdir / "chrf.png"
    overlay(curves, label="chrF on the validation set", path=picture)
    header = ("emoji, English to German", "BLEU", "chrF", "exact")
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    table = Table(f"Held-out emoji{spread}", header, tuple(rows))
    show(table)
    samples = translations(workdir)
    show(Table("", samples.header[1:], tuple(row[1:] for row in samples.rows)))
    return write_report(
        workdir,
        title="CLIPTrans on emoji",
        table=table,
        tables=[samples],
        figures=[("chrF on the validation set over the steps of translation", picture)],
        families=CURVES,
    )


def translations(workdir: pathlib.Path) -> Table:
    """Some test emoji with their pictures, and translations of their names by the seed 0 models."""
    outputs = {
        title: read_translations(workdir / f"{name}_0" / "translate" / "translations.tsv")
        for title, name in MODELS.items()
    }
    rows = outputs["CLIPTrans"]
    chosen = [i * len(rows) // SHOWN for i in range(SHOWN)]
    run = workdir / "cliptrans_0" / "translate"
    config = freeze_stored(Config, load_config(run), run)
    return picture_columns(
        with_pictures(config, [rows[i] for i in chosen]),
        {title: [found[i].output for i in chosen] for title, found in outputs.items()},
    )


if __name__ == "__main__":
    main()
