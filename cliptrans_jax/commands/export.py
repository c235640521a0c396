"""`cliptrans export`: a folder that `transformers` loads."""

import argparse
from pathlib import Path

from common_jax.command_line import Command, read_settings
from common_jax.commands.arguments import add_export_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_export_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the folder, and uploads it if requested."""
    from cliptrans_jax.export.folder import export
    from cliptrans_jax.runs.finished import find
    from common_jax.commands.hub import conclude
    from common_jax.mesh import start_backend
    from common_jax.workdir import check_output

    check_output("OUT", args.out)
    start_backend()
    out = Path(args.out).expanduser()
    files = export(find(args.run, settings=read_settings(args.rest)), out)
    print(f"{out}: {', '.join(files)}")
    conclude(out, args.push)


COMMAND = Command(
    "write a folder that transformers loads, with a model card: RUN OUT",
    add_arguments,
    run,
    rest=("--config.",),
)
