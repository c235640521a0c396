"""`m2mkd sweep`: runs a config for every setting of a grid, with several seeds."""

from typing import TYPE_CHECKING, Any

from common_jax.commands.shared import sweep_command

if TYPE_CHECKING:
    from common_jax.commands.sweep.cells import Files, Program

EXAMPLE = """
Example:
  m2mkd sweep --config=m2mkd/digits.py:phase=end_to_end --workdir=runs/moe \\
      --grid='model.moe.experts=4,8;optim.lr=1e-3,3e-3' --seeds=3 --config.optim.epochs=5
"""


def program() -> "Program":
    """This package's part of the command."""
    from common_jax.commands.sweep.cells import Program
    from m2mkd_jax.config import Config
    from m2mkd_jax.phases.fields import idle, reads

    return Program("m2mkd_jax.main", "phase", Config, "test/accuracy", results, reads(), idle)


def results(config: Any) -> "tuple[str | None, Files]":
    """The folder of the run whose result counts for a cell (None if there are several runs and none
    is the main one), and all result files."""
    from common_jax.commands.sweep.cells import NOWHERE
    from m2mkd_jax.phases import pipeline

    if config.phase == "pipeline":
        folders = [name for name, _ in pipeline.plan(config, NOWHERE)]
        main = pipeline.result_folder()
    else:
        folders = list(pipeline.run_folders(config))
        main = None if len(folders) > 1 else ""
    return main, dict.fromkeys(folders, ("result.json",))


COMMAND = sweep_command("m2mkd", "phase", program, EXAMPLE)
