"""`cliptrans sweep`: one config per setting of a grid and seed."""

from typing import TYPE_CHECKING, Any

from common_jax.commands.shared import sweep_command

if TYPE_CHECKING:
    from common_jax.commands.sweep.cells import Files, Program

EXAMPLE = """
Example:
  cliptrans sweep --config=cliptrans/emoji.py:stage=translate --workdir=runs/rates \\
      --grid='optim.lr=1e-4,3e-4' --seeds=3 --config.sources.clip=runs/emoji/clip
"""


def program() -> "Program":
    """What a sweep needs to know about this package."""
    from cliptrans_jax.config import READS, Config
    from cliptrans_jax.runs.idle import idle
    from common_jax.commands.sweep.cells import Program

    return Program("cliptrans_jax.main", "stage", Config, "test/bleu", results, READS, idle)


def results(config: Any) -> "tuple[str | None, Files]":
    """The folder of the run whose results a cell reports, and the files that it must have."""
    from cliptrans_jax.runs.pipeline import plan
    from cliptrans_jax.stages import outcomes
    from common_jax.commands.sweep.cells import NOWHERE

    runs = {folder: outcomes(one.stage) for folder, one in plan(config, NOWHERE)}
    return list(runs)[-1], runs


COMMAND = sweep_command("cliptrans", "stage", program, EXAMPLE)
