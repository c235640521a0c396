"""`m2mkd export RUN OUT`: writes a folder that timm can load, if timm has the network."""

import argparse
from pathlib import Path

from common_jax.command_line import Command
from common_jax.commands.arguments import add_export_arguments, natural


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_export_arguments(parser)
    parser.add_argument("--module", type=natural, metavar="K", help="which of several modules")


def run(args: argparse.Namespace) -> None:
    """Writes the folder, and uploads it if asked to."""
    from common_jax.commands.hub import conclude
    from common_jax.workdir import check_output
    from m2mkd_jax.pretrained.folder import write_folder
    from m2mkd_jax.trained import read_run

    check_output("OUT", args.out)
    out = Path(args.out).expanduser()
    found = read_run(args.run)
    written = write_folder(found.source, out, stage=args.module, classes=found.classes)
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    print(f"{out}: {files}, of kind {written.kind}")
    conclude(out, args.push)


COMMAND = Command(
    "write weights, config and a model card to a folder: RUN OUT",
    add_arguments,
    run,
)
