"""`m2mkd check`: the contents of a config's data, and all problems that stop a run."""

import argparse
from typing import TYPE_CHECKING

from common_jax.command_line import Command
from common_jax.commands.arguments import add_none

if TYPE_CHECKING:
    from common_jax.commands.check import Checker

EXAMPLE = """Example:
  m2mkd check --config=m2mkd/vmoe_base.py --config.data.path=/data/imagenet
  m2mkd check --config=m2mkd/cifar10_vmoe.py --config.data.path=/data/birds
"""


def run(args: argparse.Namespace) -> None:
    """Prints the findings and exits with 0 if a run could start, otherwise with 1."""
    from common_jax.commands.check import main

    main(["m2mkd check", *args.rest], {"phase": checker()})


def checker() -> "Checker":
    """This package's part of checking."""
    from common_jax.commands.check import Checker
    from m2mkd_jax.commands.check_images import check_m2mkd
    from m2mkd_jax.config import Config
    from m2mkd_jax.data.own.discover import settings_of

    return Checker(Config, check_m2mkd, settings_of, EXAMPLE)


COMMAND = Command(
    "what a config's data holds, and every problem that keeps a run from starting",
    add_none,
    run,
    rest=("",),
)
