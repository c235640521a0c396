"""`m2mkd show RUN_OR_CONFIG`: config, parameters, and FLOPs of a step."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common_jax.command_line import Command
from common_jax.commands.arguments import add_show_arguments

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from common_jax.commands.show import Training
    from m2mkd_jax.config import Config

EPOCH = 1000  # steps per epoch, any number: neither parameters nor FLOPs depend on it


def run(args: argparse.Namespace) -> None:
    """Prints everything about a run or a config."""
    from common_jax.commands.show import Subject, show
    from m2mkd_jax.config import SYSTEM, Config

    show(args, Subject(SYSTEM, Config, trainings))


def trainings(config: "Config", mesh: "Mesh") -> "Iterator[Training]":
    """Yields the runs of a config."""
    from etils import epath

    from common_jax.commands.show import Training
    from m2mkd_jax.phases import PHASES
    from m2mkd_jax.phases.pipeline import plan, run_folders

    runs = dict(plan(config, epath.Path())) if config.phase == "pipeline" else run_folders(config)
    for folder, one in runs.items():
        task = PHASES[one.phase].describe(one, mesh).task(steps_per_epoch=EPOCH)
        yield Training(folder or task.title, task, one.optim)


COMMAND = Command(
    "the config with the meaning of every field, the parameters, the FLOPs of a step",
    add_show_arguments,
    run,
    rest=("--config.",),
)
