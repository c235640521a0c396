"""`cliptrans plan`: memory and time per step on TPUs or GPUs that you do not have."""

from typing import TYPE_CHECKING

from common_jax.commands.shared import plan_command

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from cliptrans_jax.config import Config
    from common_jax.commands.plan.compile import Options, Planner, Step

EXAMPLE = """Example:
  cliptrans plan --config=cliptrans/multi30k.py:stage=translate --topology=v5e:16x16
"""
MULTI30K = 29_000  # training examples


def planner() -> "Planner":
    """Makes the programs to compile for this package."""
    from cliptrans_jax.config import Config
    from common_jax.commands.plan.compile import Planner

    return Planner(Config, make_step, EXAMPLE)


def make_step(asked: "Config", mesh: "Mesh", options: "Options") -> "Step":
    """The train step of a stage, or the program that runs a frozen tower."""
    import dataclasses

    from cliptrans_jax.main import check_run
    from cliptrans_jax.runs import translation
    from cliptrans_jax.stages import TRANSLATION_STAGES
    from common_jax.commands.plan.compile import train_step
    from common_jax.commands.plan.steps import step_flops

    if options.encode:
        return encode_step(asked, mesh, options)
    if asked.stage not in TRANSLATION_STAGES:
        raise ValueError(
            f"config.stage={asked.stage!r} must be one of {list(TRANSLATION_STAGES)}: each "
            "compiles to its own program"
        )
    check_run(asked, mesh)
    optim = asked.apply_parity().optim
    examples = options.examples or max(MULTI30K, optim.batch)
    sizes = {"examples": examples, "tokens": options.tokens}
    task = translation.describe(asked, mesh, **sizes)
    # A loop over chunks of labels has a data-dependent trip count, so its operations cannot be
    # counted. With all labels in one chunk there is no loop.
    whole = dataclasses.replace(asked, label_chunk=optim.batch * options.tokens)
    flops = step_flops(translation.describe(whole, mesh, **sizes), optim)
    savers = [f"{asked.model.key}.remat", "config.label_chunk"]
    return train_step(task, asked, optim, mesh, savers, flops=flops)


def encode_step(config: "Config", mesh: "Mesh", options: "Options") -> "Step":
    """The program that computes features of sentences or pictures, with parameters replicated.

    Towers trained here have the sizes in config.clip, published ones their default sizes.
    """
    import jax
    import numpy as np

    from cliptrans_jax.encoders import ImageTower
    from cliptrans_jax.features import encode_program
    from cliptrans_jax.runs.run_towers import describe_text
    from cliptrans_jax.towers import siglip
    from common_jax.commands.plan.compile import Step, placed_on, precision_savers
    from common_jax.commands.plan.flops import count_flops
    from common_jax.mesh import batched, replicated

    if options.encode == "texts":
        tower = describe_text(config)
        batch = tower.batch_shapes(mesh, tokens=options.tokens)
        title = "features of {} sentences of {} tokens".format(*batch["ids"].shape)
    else:
        sizes = siglip.VISION.config() if config.sources.siglip else config.clip.image
        tower = ImageTower.described(sizes, config.dtype)
        batch = tower.batch_shapes(mesh)
        title = "features of {} pictures of {} x {} pixels".format(*batch["image"].shape)
    row = jax.ShapeDtypeStruct(batch["_mask"].shape, np.int32)
    placed, row = placed_on((batch, row), batched(mesh))
    params = placed_on(tower.params, replicated(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = encode_program(tower.apply_batch, mesh).lower(params, placed, row)
    return Step(
        title=title,
        lowered=lowered,
        arguments={"params": params, "batch": placed},
        flops=count_flops(tower.apply_batch, tower.params, batch),
        kept=list,
        savers=precision_savers(config),
    )


COMMAND = plan_command("cliptrans", "stage", planner)
