"""`cliptrans train`: trains one stage, or all of them."""

import argparse
import sys

from common_jax.command_line import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # all arguments go to the run's own command line


def _run(args: argparse.Namespace) -> None:
    from cliptrans_jax import main
    from common_jax import app

    argv = ["cliptrans train", *args.rest]
    app.run(main.main, main.DESCRIPTION, argv, system=main.SYSTEM, reads=main.READS)
    sys.stdout.flush()


COMMAND = Command(
    "train a stage or a whole pipeline: --config=FILE.py:ARGUMENTS --workdir=DIR",
    _add_arguments,
    _run,
    rest=("",),
)
