"""The commands of the program `cliptrans`, one file each."""

from collections.abc import Mapping

from cliptrans_jax.commands import (
    check,
    evaluate,
    export,
    features,
    plan,
    show,
    sweep,
    train,
    translate,
)
from common_jax.command_line import Command, dispatch

# In the order of --help.
COMMANDS: Mapping[str, Command] = {
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "translate": translate.COMMAND,
    "features": features.COMMAND,
    "export": export.COMMAND,
    "check": check.COMMAND,
    "plan": plan.COMMAND,
    "sweep": sweep.COMMAND,
    "show": show.COMMAND,
}


def main() -> int:
    """Runs the command of the process's command line, and returns the exit status."""
    return dispatch("cliptrans", COMMANDS)
