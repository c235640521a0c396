"""The program `m2mkd`: one file per command, in the order of its --help."""

from common_jax.command_line import Command, dispatch
from m2mkd_jax.commands import check, evaluate, export, features, plan, predict, show, sweep, train

COMMANDS: dict[str, Command] = {
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "predict": predict.COMMAND,
    "features": features.COMMAND,
    "export": export.COMMAND,
    "check": check.COMMAND,
    "plan": plan.COMMAND,
    "sweep": sweep.COMMAND,
    "show": show.COMMAND,
}


def main() -> int:
    """Runs the command that the command line names, and returns the exit status."""
    return dispatch("m2mkd", COMMANDS)
