"""Commands that both programs share, built from each package's part; imports nothing slow."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from common_jax.command_line import Command
from common_jax.commands.arguments import add_none

if TYPE_CHECKING:
    from common_jax.commands.check import Checker
    from common_jax.commands.plan.compile import Planner
    from common_jax.commands.sweep.cells import Program


def check_command(program: str, field: str, checker: Callable[[], "Checker"]) -> Command:
    """`PROGRAM check`: what a config's data contain, and what keeps a run from starting.

    Args:
      program: the program's name, as a user types it.
      field: the config field that identifies the program's configs.
      checker: imports and returns the package's part.
    """

    def run(args: argparse.Namespace) -> None:
        from common_jax.commands.check import main

        main([f"{program} check", *args.rest], {field: checker()})

    return passing(
        "what a config's data contain, and every problem that keeps a run from starting", run
    )


def plan_command(program: str, field: str, planner: Callable[[], "Planner"]) -> Command:
    """`PROGRAM plan`: memory and time of a run's step on TPUs or GPUs. Arguments are as for
    `check_command`."""

    def run(args: argparse.Namespace) -> None:
        from common_jax.commands.plan.compile import main

        main([f"{program} plan", *args.rest], {field: planner()})

    return passing("memory and time of a step on TPUs or GPUs that you do not have", run)


def sweep_command(program: str, field: str, part: Callable[[], "Program"], example: str) -> Command:
    """`PROGRAM sweep`: a config for every setting of a grid and several seeds. Arguments are as for
    `check_command`; `example` is an example command for --help."""

    def run(args: argparse.Namespace) -> int:
        from common_jax.commands.sweep.command import main

        return main(args.rest, {field: part()}, example, f"{program} sweep")

    return passing(
        "run a config for every setting of a grid, several seeds each, and make one table", run
    )


def passing(summary: str, run: Callable[[argparse.Namespace], int | None]) -> Command:
    """A command that parses all of its arguments itself, from the list `rest`."""
    return Command(summary, add_none, run, rest=("",))
