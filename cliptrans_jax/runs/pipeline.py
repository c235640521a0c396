"""The pipeline: all stages that have a recipe, in order, each in its own folder. Interrupted stages
are resumed, finished ones skipped."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from etils import epath
from jax.sharding import Mesh

from cliptrans_jax.config import Config, Recipe
from cliptrans_jax.runs import contrastive, translation
from cliptrans_jax.runs.evaluate import evaluate
from cliptrans_jax.stages import EVALUATE, PIPELINE, STAGES, Trains
from common_jax.config import in_recipe, under
from common_jax.nn.dense import matmul_precision
from common_jax.workdir import claim, refuse_other_config, unfinished

Run = Callable[[Config, epath.Path, Mesh], dict[str, Any]]
# The module whose `run` and `check` a stage uses, by the network that it trains.
MODULES = {Trains.TOWERS: contrastive, Trains.TRANSLATOR: translation}


def run_stage(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Runs config.stage and returns its result; for the pipeline, the result of the last stage."""
    runs: dict[str, Run] = {
        **{name: MODULES[stage.trains].run for name, stage in STAGES.items()},
        EVALUATE: evaluate,
        PIPELINE: run_pipeline,
    }
    with matmul_precision(config.matmul_precision):
        return runs[config.stage](config, workdir, mesh)


def run_pipeline(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Runs every stage that has a recipe. Each starts from the weights of the previous one and uses
    the M-CLIP of stage "clip", unless config.sources names other towers."""
    refuse_other_config(workdir, config)
    check_pipeline(config, workdir, mesh)
    claim(workdir, config)
    result, runs = {}, plan(config, workdir)
    for number, (folder, one) in enumerate(runs, 1):
        logging.info("stage %d of %d: %s", number, len(runs), folder)
        with in_recipe(Recipe, one.stage):
            result = run_stage(one, workdir / folder, mesh)
    return result


def check_pipeline(config: Config, workdir: epath.Path, mesh: Mesh) -> None:
    """Checks data, recipes and networks of every unfinished stage; writes nothing. All processes
    must call this together.

    Raises:
      FileNotFoundError, ValueError: as the runs.
    """
    for folder, one in unfinished(workdir, plan(config, workdir)):
        check = MODULES[STAGES[one.stage].trains].check
        with in_recipe(Recipe, one.stage):
            check(one, workdir / folder, mesh, key=f"config.recipes.{one.stage}")


def plan(config: Config, workdir: epath.Path) -> list[tuple[str, Config]]:
    """The runs of a config in order, as pairs of a folder below `workdir` and a config: those of a
    pipeline, or the config itself in the folder "".

    Raises:
      ValueError: if a pipeline has no recipes.
    """
    if config.stage != PIPELINE:
        return [("", config)]
    if not config.recipes:
        raise ValueError("config.recipes is empty; stage='pipeline' needs at least one recipe")
    sources, runs, last = config.sources, [], ""
    towers = sources.clip or sources.clip_image or sources.siglip
    # With lock_text, stage "clip" trains the image tower for this text tower.
    towers = towers or (sources.clip_text and not config.clip.lock_text)
    clip = sources.clip
    for name, stage in STAGES.items():
        trains_towers = stage.trains is Trains.TOWERS
        if name not in config.recipes or (trains_towers and towers):
            continue
        recipe = config.recipes[name]
        with under("config"):
            start = dataclasses.replace(sources.after(last), clip=clip)
            one = dataclasses.replace(
                config,
                stage=name,
                sources=sources if trains_towers else start,
                optim=recipe.optim,
                label_smoothing=recipe.label_smoothing,
                recipes={},
                features=config.features or str(workdir / "features"),
                unfreeze_clip=config.unfreeze_clip and stage.unfreezes_tower,
                all_languages=config.all_languages and stage.captioning,
            )
        runs.append((name, one))
        if trains_towers:
            clip = str(workdir / name)
        else:
            last = str(workdir / name)
    return runs
