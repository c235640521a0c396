"""`cliptrans translate`: translates sentences with a trained model."""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from common_jax.command_line import Command, read_settings
from common_jax.commands.arguments import add_run, count
from common_jax.commands.output import json_line

if TYPE_CHECKING:
    from cliptrans_jax.evaluators.show import Hypothesis
    from cliptrans_jax.lines import Line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_run(parser)
    parser.add_argument(
        "sentences",
        metavar="SENTENCE",
        nargs="*",
        help="without sentences or --file, lines of standard input are translated",
    )
    parser.add_argument(
        "--file", metavar="FILE", help="UTF-8 text with a sentence per line, plain or .gz"
    )
    parser.add_argument(
        "--pictures",
        metavar="PATH",
        help="folder of pictures, each named after its sentence, separated by a tab; or one "
        "picture for all sentences. Features are then computed from the pictures",
    )
    parser.add_argument(
        "--picture-names", metavar="FILE", help="names of the pictures, one per line"
    )
    parser.add_argument("--beams", type=count, help="number of beams; 1 is greedy decoding")
    parser.add_argument("--length-penalty", type=float, help="above 1 favours long translations")
    parser.add_argument("--n-best", type=count, default=1, help="translations per sentence")
    parser.add_argument("--scores", action="store_true", help="print the score of each translation")
    parser.add_argument("--json", action="store_true", help="print a JSON object per sentence")
    parser.add_argument(
        "--batch",
        type=count,
        help="sentences translated at a time; default: as in the run, or 1 at a terminal",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the translations of all sentences, in order, as they become available."""
    from cliptrans_jax.lines import translate_lines
    from cliptrans_jax.loading import load_finished
    from cliptrans_jax.runs.finished import find
    from cliptrans_jax.stages import TRANSLATION_STAGES
    from common_jax import app
    from common_jax.mesh import make_mesh

    _check(args)
    lines = _lines(args)
    if _is_whole(args):
        lines = list(lines)  # checks all lines and picture names before translating the first
    settings = read_settings(args.rest) | _search_settings(args)
    for name in settings:
        if name == "test_side" or name.startswith("noise."):
            raise ValueError(
                f"--config.{name} is for `cliptrans evaluate`: sentences are translated whole, and "
                "pictures are given with --pictures"
            )
    trained = find(args.run, TRANSLATION_STAGES, settings)
    decode, mesh = trained.config.decode, make_mesh(trained.config.mesh)
    if args.n_best > decode.beams:
        raise ValueError(
            f"--n-best={args.n_best} is more than the {decode.beams} beams of the search; add "
            f"--beams={args.n_best}"
        )
    app.use_compilation_cache(trained.config.run.compilation_cache)
    size = args.batch or _choose_batch(args, lines, decode.batch)
    model = load_finished(trained.with_batch(size, mesh), mesh=mesh)
    for number, (line, found) in enumerate(translate_lines(model, lines, size=size), start=1):
        print(_format(args, number, line, found[: args.n_best]), flush=True)


def _check(args: argparse.Namespace) -> None:
    if args.sentences and args.file:
        raise ValueError(f"--file={args.file} and sentences: give one of them")
    if args.picture_names and not args.pictures:
        raise ValueError("--picture-names is for --pictures=FOLDER, which is missing")


def _is_whole(args: argparse.Namespace) -> bool:
    """True if all sentences are available up front; standard input may still be growing."""
    return bool(args.sentences or args.file)


def _lines(args: argparse.Namespace) -> "Iterable[Line]":
    from cliptrans_jax.data.corpus import read_lines
    from cliptrans_jax.lines import Line, add_pictures, read_sentences, read_stream
    from common_jax.workdir import check_input

    check_input("--file", args.file or "", "a text file")
    check_input("--picture-names", args.picture_names or "", "a text file")
    if args.sentences:
        lines: Iterable[Line] = (
            Line.of(f"sentence {i}", " ".join(text.splitlines()))
            for i, text in enumerate(args.sentences, 1)
        )
    elif args.file:
        lines = read_sentences(Path(args.file).expanduser())
    else:
        lines = read_stream(sys.stdin.buffer, "standard input")
    if not args.pictures:
        return lines
    names = None
    if args.picture_names:
        names = read_lines(Path(args.picture_names).expanduser())
    return add_pictures(lines, Path(args.pictures).expanduser(), names)


def _choose_batch(args: argparse.Namespace, lines: "Iterable[Line]", usual: int) -> int:
    if _is_whole(args):
        return max(1, min(usual, len(lines)))
    return 1 if sys.stdin.isatty() else usual


def _search_settings(args: argparse.Namespace) -> dict[str, str]:
    names = ("beams", "length_penalty")
    values = {name: getattr(args, name) for name in names}
    return {f"decode.{name}": str(value) for name, value in values.items() if value is not None}


def _format(
    args: argparse.Namespace, number: int, line: "Line", hypotheses: "list[Hypothesis]"
) -> str:
    """The output for a sentence: one line per translation."""
    if args.json:
        picture = {} if line.picture is None else {"picture": str(line.picture)}
        found = [{"text": one.text, "score": round(one.score, 6)} for one in hypotheses]
        value = {"line": number, "source": line.text, **picture, "translations": found}
        return json_line(value)
    if not hypotheses:
        return ""
    rows = []
    for one in hypotheses:
        cells = [str(number)] if args.n_best > 1 else []
        cells += [f"{one.score:.4f}"] if args.scores else []
        # A line break would put all following output lines out of step with the input.
        rows.append("\t".join([*cells, re.sub(r"\s", " ", one.text)]))
    return "\n".join(rows)


COMMAND = Command(
    "translate sentences, with pictures or without: RUN SENTENCE..., --file, or standard input",
    add_arguments,
    run,
    rest=("--config.", "--data.", "--decode."),
)
