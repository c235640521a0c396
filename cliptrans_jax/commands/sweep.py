"""`cliptrans sweep`: a config for every setting of a grid and several seeds."""

import argparse
from typing import TYPE_CHECKING, Any

from common_jax.command_line import Command
from common_jax.commands.arguments import add_none

if TYPE_CHECKING:
    from common_jax.commands.sweep.cells import Files, Program

EXAMPLE = """
Example:
  cliptrans sweep --config=cliptrans/emoji.py:stage=translate --workdir=runs/rates \\
      --grid='optim.lr=1e-4,3e-4' --seeds=3 --config.sources.clip=runs/emoji/clip
"""
OUTCOMES = {"clip": ("result.json",), "evaluate": ("scores.json",)}  # of the other stages both


def run(args: argparse.Namespace) -> int:
    """Runs or prints what is not finished, and makes the table; returns the exit status."""
    from common_jax.commands.sweep.command import main

    return main(args.rest, {"stage": program()}, EXAMPLE, "cliptrans sweep")


def program() -> "Program":
    """What a sweep needs to know of this package."""
    from cliptrans_jax.config import READS, Config
    from common_jax.commands.sweep.cells import Program

    return Program("cliptrans_jax.main", "stage", Config, "test/bleu", results, READS)


def results(config: Any) -> "tuple[str | None, Files]":
    """The folder of the run that a cell is about, and all files."""
    from cliptrans_jax.runs import pipeline
    from common_jax.commands.sweep.cells import NOWHERE

    runs = {"": config.stage}
    if config.stage == "pipeline":
        runs = {folder: one.stage for folder, one in pipeline.plan(config, NOWHERE)}
    both = ("result.json", "scores.json")
    return list(runs)[-1], {name: OUTCOMES.get(stage, both) for name, stage in runs.items()}


COMMAND = Command(
    "run a config for every setting of a grid, several seeds each, and make one table",
    add_none,
    run,
    rest=("",),
)
