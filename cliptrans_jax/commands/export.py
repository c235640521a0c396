"""`cliptrans export`: a folder that `transformers` loads."""

import argparse
from pathlib import Path

from common_jax.command_line import Command, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "run", metavar="RUN", help="workdir of a run or of a pipeline, or the folder of one step"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--push",
        metavar="ID",
        help="also upload it to the Hugging Face hub, as a private model unless ID exists",
    )


def run(args: argparse.Namespace) -> None:
    """Writes the folder, and uploads it where that is asked for."""
    from cliptrans_jax.export.folder import export
    from cliptrans_jax.runs.finished import find
    from common_jax.commands.hub import push
    from common_jax.mesh import start_backend

    start_backend()
    out = Path(args.out).expanduser()
    files = export(find(args.run, settings=read_settings(args.rest)), out)
    print(f"{out}: {', '.join(files)}")
    print("README.md is the model card; fill in the licence")
    if args.push:
        print(f"uploaded to {push(out, args.push)}")


COMMAND = Command(
    "write a folder that transformers loads, with a model card: RUN OUT",
    add_arguments,
    run,
    rest=("--config.",),
)
