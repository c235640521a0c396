"""`cliptrans evaluate`: scores a trained model on any corpus and split."""

import argparse
import json
import tempfile

from common_jax.command_line import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="workdir of a run or of a pipeline, or the folder of one step"
    )
    parser.add_argument("--split", help="the corpus's name of it; by default the run's test split")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for scores.json, translations.tsv and features/"
    )
    parser.add_argument("--json", action="store_true", help="print the content of scores.json")
    parser.epilog = (
        "--config.FIELD=VALUE sets another corpus or search, such as --config.data.path=DIR, "
        "--config.data.target_language=fr, --config.decode.beams=10 or --config.test_side=image"
    )


def _run(args: argparse.Namespace) -> None:
    from etils import epath

    from cliptrans_jax.runs.evaluate import rescore
    from cliptrans_jax.runs.finished import find
    from cliptrans_jax.stages import TRANSLATION_STAGES
    from common_jax.mesh import MeshConfig, make_mesh
    from common_jax.workdir import check_output

    split = [] if args.split is None else [f"--config.data.test_split={args.split}"]
    run = find(args.run, TRANSLATION_STAGES, flags=[*args.rest, *split])
    mesh = make_mesh(MeshConfig())
    run = run.with_batch(run.config.decode.batch, mesh)
    if args.out is not None:
        check_output("--out", args.out)
    with tempfile.TemporaryDirectory() as folder:
        scores = rescore(run, epath.Path(args.out or folder).expanduser(), mesh)
    if args.json:
        print(json.dumps(scores, indent=2))
        return
    print(f"{scores['set']}: {scores['sentences']} sentences, with {run.step}")
    for name, signature in scores["signatures"].items():
        print(f"{name:10} {scores[name]:6.2f}  {signature}")


COMMAND = Command(
    "score a trained model on any corpus and split, without training: BLEU, chrF and more",
    _add_arguments,
    _run,
    rest=("--config.",),
)
