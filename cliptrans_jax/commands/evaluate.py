"""`cliptrans evaluate`: scores a trained model on any corpus and split."""

import argparse
import json
import tempfile

from common_jax.command_line import Command, read_settings
from common_jax.commands.arguments import add_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_run(parser)
    parser.add_argument(
        "--split", help="split to score, as the corpus names it; default: the run's test split"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder for scores.json, translations.tsv and features/"
    )
    parser.add_argument("--json", action="store_true", help="print scores.json")
    parser.epilog = (
        "The corpus is the one in the run's config.data. Any of its fields, and any field of the "
        "search, can be changed:\n"
        "  --data.source=text --data.path=/data/mine --data.test_split=val\n"
        "  --decode.beams=10 --config.test_side=image"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the scores, and writes them to --out if given."""
    from etils import epath

    from cliptrans_jax.runs.evaluate import rescore
    from cliptrans_jax.runs.finished import find
    from cliptrans_jax.stages import TRANSLATION_STAGES
    from common_jax import app
    from common_jax.mesh import make_mesh
    from common_jax.workdir import check_output

    split = {} if args.split is None else {"data.test_split": args.split}
    trained = find(args.run, TRANSLATION_STAGES, read_settings(args.rest) | split)
    mesh = make_mesh(trained.config.mesh)
    trained = trained.with_batch(trained.config.decode.batch, mesh)
    app.use_compilation_cache(trained.config.run.compilation_cache)
    if args.out is not None:
        check_output("--out", args.out)
        if (epath.Path(args.out).expanduser() / "config.json").exists():
            raise ValueError(
                f"--out={args.out} is the folder of a run or of an exported model, whose scores "
                "would be overwritten; give another one"
            )
    with tempfile.TemporaryDirectory() as folder:
        scores = rescore(trained, epath.Path(args.out or folder).expanduser(), mesh)
    if args.json:
        print(json.dumps(scores, indent=2))
        return
    print(f"{scores['set']}: {scores['sentences']} sentences, with {trained.step}")
    for name, signature in scores["signatures"].items():
        print(f"{name:10} {scores[name]:6.2f}  {signature}")


COMMAND = Command(
    "score a trained model on any corpus and split, without training: BLEU, chrF and more",
    add_arguments,
    run,
    rest=("--config.", "--data.", "--decode."),
)
