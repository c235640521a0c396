"""`m2mkd plan`: memory and time of a run's train step on TPUs or GPUs that you do not have."""

from typing import TYPE_CHECKING

from common_jax.commands.shared import plan_command

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from common_jax.commands.plan.compile import Options, Planner, Step
    from m2mkd_jax.config import Config

EXAMPLE = """Examples:
  m2mkd plan --config=m2mkd/vmoe_base.py:phase=end_to_end --topology=v5e:16x16
  m2mkd plan --config=m2mkd/vmoe_base.py:phase=end_to_end --topology=h100:1x8
"""
IMAGENET = 1_281_167  # training images


def planner() -> "Planner":
    """This package's part of the command."""
    from common_jax.commands.plan.compile import Planner
    from m2mkd_jax.config import Config

    return Planner(Config, make_step, EXAMPLE)


def make_step(config: "Config", mesh: "Mesh", options: "Options") -> "Step":
    """The train step of a phase."""
    from common_jax.commands.plan.compile import train_step
    from common_jax.commands.plan.steps import step_flops
    from common_jax.inputs import steps_per_epoch
    from m2mkd_jax.families import family_of
    from m2mkd_jax.main import check_run
    from m2mkd_jax.phases import PHASES
    from m2mkd_jax.phases.pipeline import describe

    if options.encode:
        raise ValueError("--encode is for CLIPTrans, whose towers compute features in advance")
    training = describe(config, mesh)
    check_run(config, mesh)
    examples = options.examples or max(IMAGENET, config.optim.batch)
    epoch = steps_per_epoch(examples, config.optim.batch)
    task = training.task(steps_per_epoch=epoch)
    sections = PHASES[config.phase].differentiates
    savers = [f"config.{name}.remat" for name in sections]
    savers += [field for name in sections for field in family_of(getattr(config, name)).savers]
    return train_step(
        task, config, config.optim, mesh, savers, flops=step_flops(task, config.optim)
    )


COMMAND = plan_command("m2mkd", "phase", planner)
