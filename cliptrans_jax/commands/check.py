"""`cliptrans check`: the contents of a config's data, and all problems that stop a run."""

import argparse
from typing import TYPE_CHECKING

from common_jax.command_line import Command
from common_jax.commands.arguments import add_none

if TYPE_CHECKING:
    from common_jax.commands.check import Checker

EXAMPLE = """Example:
  cliptrans check --config=cliptrans/multi30k.py:target=fr \\
      --config.data.path=/data/multi30k --all
"""


def run(args: argparse.Namespace) -> None:
    """Prints the findings and exits with 0 if a run could start, otherwise with 1."""
    from common_jax.commands.check import main

    main(["cliptrans check", *args.rest], {"stage": checker()})


def checker() -> "Checker":
    """What checking needs to know of this package."""
    from cliptrans_jax.commands.check_corpora import check_cliptrans
    from cliptrans_jax.config import Config
    from cliptrans_jax.data.own import settings_of
    from common_jax.commands.check import Checker

    return Checker(Config, check_cliptrans, settings_of, EXAMPLE)


COMMAND = Command(
    "what a config's data holds, and every problem that keeps a run from starting",
    add_none,
    run,
    rest=("",),
)
