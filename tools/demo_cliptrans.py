"""CLIPTrans on emoji in minutes: do text features, and pretraining on captions, help translation?

Trains a small M-CLIP on pictures and their names in six languages, then three translators from
English to German with equal budgets: a text-only mBART, one with features as a prefix, and one that
first learned to caption the pictures. There are two test sets: names that are new compositions of
known words, and emoji with no variant (skin tone, gender, hair) in the training set, whose names
contain new words. Prints a table and a few translations for each, and translates some lines at the
end. Run it again to resume an interrupted demo.

    python tools/demo_cliptrans.py --workdir runs/demo/cliptrans
"""

import argparse
import dataclasses
import pathlib
import shlex
import time

from use import show_use

from cliptrans_jax.config import Config
from cliptrans_jax.curves import CURVES
from cliptrans_jax.evaluators.show import picture_columns, read_translations
from cliptrans_jax.runs.scoring import with_pictures
from common_jax.checkpoint import load_config
from common_jax.commands.sweep.jobs import (
    Job,
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
from common_jax.workdir import freeze_stored, read_json

CONFIG = "configs/cliptrans/emoji.py"
# Row of the table -> name of its runs.
MODELS = {
    "text only": "text_only",
    "CLIPTrans without captioning": "no_captioning",
    "CLIPTrans": "cliptrans",
}
# Test set in the table -> (folder of its scores in a run, split).
TESTS = {"new compositions": ("test_compositions", "compositions"), "new words": ("", "test")}
SHOWN = 6
LINES = ("man pilot", "ear dark skin tone", "old man medium-light skin tone")  # new compositions


@ends_quietly
def main() -> None:
    flags = parse_demo(demo_parser(__doc__, workdir="runs/demo/cliptrans", seeds=1))
    start = time.time()
    run_all(plan(flags), flags.workdir, at_a_time=flags.jobs)
    finish(flags, start)


def finish(flags: argparse.Namespace, start: float) -> None:
    """Shows the results of all runs and some translations; `start` is when the demo began."""
    report = summarise(flags.workdir, flags.seeds)
    print(f"\n{report.resolve()}   ({time.time() - start:.0f} s)")
    show_use("cliptrans", "translate", str(flags.workdir / "cliptrans_0" / "translate"), *LINES)


def plan(flags: argparse.Namespace) -> dict[str, Job]:
    """The jobs by name; all runs with features use the same M-CLIP.

    The first CLIPTrans runs in the M-CLIP's process, which has already rendered the pictures.
    """
    clip = flags.workdir.resolve() / "clip"

    def line(run: str, arguments: str, seed: int = 0) -> str:
        command = [run, f"--config={CONFIG}:{arguments}", f"--config.seed={seed}", *flags.flags]
        if arguments in ("model=cliptrans", "model=no_captioning"):
            command += [f"--config.sources.clip={clip}"]
            command += [f"--config.features={clip.parent / 'features'}"]
        return shlex.join(command)

    def in_turn(*lines: str) -> tuple[str, ...]:
        return ("tools/in_turn.py", "cliptrans_jax.main", *lines)

    first = line("cliptrans_0", "model=cliptrans")
    jobs = {"cliptrans_0": Job(in_turn(line("clip", "stage=clip"), first))}
    for name in ("text_only", "cliptrans", "no_captioning"):
        file = None if name == "text_only" else clip / "result.json"
        for seed in range(flags.seeds):
            run = f"{name}_{seed}"
            jobs.setdefault(run, Job(in_turn(line(run, f"model={name}", seed)), file=file))
    return jobs


def summarise(workdir: pathlib.Path, seeds: int) -> pathlib.Path:
    """Prints tables and translations, writes the report on all runs, and returns its path."""
    rows, curves = [], {}
    for title, name in MODELS.items():
        runs = [workdir / f"{name}_{seed}" / "translate" for seed in range(seeds)]
        numbers = []
        for folder, _ in TESTS.values():
            scores = [read_json(run / folder / "scores.json") for run in runs]
            numbers += [mean_and_spread(scores, metric) for metric in ("exact", "chrf", "bleu")]
        rows.append((title, *numbers))
        curves[title] = [read_curve(run, "val/chrf") for run in runs]
    steps = {curve[-1][0] for group in curves.values() for curve in group}
    assert len(steps) == 1, steps
    picture = workdir / "chrf.png"
    overlay(curves, label="chrF on the validation set", path=picture)
    first, second = TESTS
    header = (
        "English to German",
        *(f"{first}: exact, %", "chrF", "BLEU"),
        *(f"{second}: exact, %", "chrF", "BLEU"),
    )
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    table = Table(f"Emoji held out of training{spread}", header, tuple(rows))
    show(table)
    retrieval = retrieval_table(workdir)
    show(retrieval)
    samples = [translations(workdir, test) for test in TESTS]
    for one in samples:
        show(dataclasses.replace(one, header=one.header[1:], rows=tuple(r[1:] for r in one.rows)))
    return write_report(
        workdir,
        title="CLIPTrans on emoji",
        table=table,
        tables=[retrieval, *samples],
        figures=[("chrF on the validation set over the steps of translation", picture)],
        families=CURVES,
    )


def retrieval_table(workdir: pathlib.Path) -> Table:
    """Retrieval accuracy of the M-CLIP among 64 pairs, picture to name and name to picture."""
    result = read_json(workdir / "clip" / "result.json")
    rows = {
        "new compositions": "test_compositions/accuracy",
        "new words, validation set": "val/accuracy",
    }
    return Table(
        "M-CLIP: pictures and names that find each other among 64 (by chance about 2 %)",
        ("emoji held out of training", "found, %"),
        tuple((name, f"{100 * result[metric]:.1f}") for name, metric in rows.items()),
    )


def translations(workdir: pathlib.Path, test: str) -> Table:
    """Some emoji of a test set, with translations of their names by the seed-0 models."""
    folder, split = TESTS[test]
    outputs = {
        title: read_translations(workdir / f"{name}_0" / "translate" / folder / "translations.tsv")
        for title, name in MODELS.items()
    }
    rows = outputs["CLIPTrans"]
    chosen = [i * len(rows) // SHOWN for i in range(SHOWN)]
    run = workdir / "cliptrans_0" / "translate"
    config = freeze_stored(Config, load_config(run), run)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test_split=split))
    return picture_columns(
        with_pictures(config, [rows[i] for i in chosen]),
        {title: [found[i].output for i in chosen] for title, found in outputs.items()},
        caption=f"Translations, {test}",
    )


if __name__ == "__main__":
    main()
