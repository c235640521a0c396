"""All phases in order, each in a folder of its own: resumable, and skipped when finished."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.config import in_recipe, under
from common_jax.workdir import claim, read_result, refuse_other_config
from m2mkd_jax.config import Config, Recipe
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.few_shot import load_splits
from m2mkd_jax.phases.fields import check_sources, given_sources
from m2mkd_jax.phases.phase import Training
from m2mkd_jax.phases.training import check_training
from m2mkd_jax.phases.weights import check_source

# A pipeline always trains the network that this field of config.sources takes, and its result is
# that run's.
PRODUCT = "network"
# Fields in which a finished run may differ from its plan: a moved pipeline has its sources in other
# folders, and an episode has labels of its own.
APART = r"sources\..*|data\.labels"


def run_phase(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Runs the phase that `config` names.

    A modular phase trains the modules of config.module in one program, in `workdir` itself; where
    config.distill.pairs_at_once allows fewer, in several, one after the other, each in a folder
    of its own such as `workdir`/module_0+1.

    Returns:
      The result of the run, or of the last one.
    """
    check_sources(config)
    if config.phase == "pipeline":
        return run_pipeline(config, workdir, mesh)
    phase = PHASES[config.phase]
    result = {}
    for folder, part in run_folders(config).items():
        result = phase.run(part, workdir / folder, mesh)
    return result


def program_folders(config: Config, *, one: str, several: str) -> dict[str, Config]:
    """The programs of a modular phase, each by the folder it trains in: `one` where there is one,
    `several`_0+1 and so on where there are several."""
    programs = config.programs()
    if len(programs) == 1:
        return {one: programs[0]}
    return {f"{several}_{program.module}": program for program in programs}


def run_folders(config: Config) -> dict[str, Config]:
    """The runs of one phase, by their folders below its workdir; "" is the workdir itself."""
    if not PHASES[config.phase].modular:
        return {"": config}
    return program_folders(config, one="", several="module")


def describe(config: Config, mesh: Mesh) -> Training:
    """The training of the one run of `config`.

    Raises:
      ValueError: where `config` means several runs.
    """
    check_sources(config)
    if config.phase == "pipeline":
        raise ValueError(
            "config.phase='pipeline' is several runs, each with a program of its own: name one of "
            f"{list(PHASES)}"
        )
    if PHASES[config.phase].modular and len(programs := config.programs()) > 1:
        raise ValueError(
            f"config.module={config.module!r} with config.distill.pairs_at_once="
            f"{config.distill.pairs_at_once} is {len(programs)} programs: name the modules of one "
            f"of them, {[program.module for program in programs]}"
        )
    return PHASES[config.phase].describe(config, mesh)


def run_pipeline(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """All phases, in the order of `PHASES`.

    Every run gets the recipe of its phase from config.recipes and the weights of the runs before
    it. A phase whose weights config.sources gives is left out, and so is an optional one without a
    recipe.

    Returns:
      The result of the run that makes `PRODUCT`.
    """
    workdir = epath.Path(workdir)
    refuse_other_config(workdir, config)
    check_pipeline(config, workdir, mesh)
    claim(workdir, config)
    results = {}
    for folder, run_config in plan(config, workdir):
        result = read_result(workdir / folder, run_config, phase=run_config.phase, apart=APART)
        if result is not None:
            logging.info("%s is finished already", folder)
            results[folder] = result
        else:
            with in_recipe(Recipe, run_config.phase):
                results[folder] = run_phase(run_config, workdir / folder, mesh)
    return results[result_folder()]


def result_folder() -> str:
    """The folder of the run whose result is the pipeline's."""
    return next(phase.folder for phase in PHASES.values() if phase.makes == PRODUCT)


def check_pipeline(config: Config, workdir: epath.Path, mesh: Mesh) -> None:
    """Checks every run that is not finished before the first one trains: data, recipes, networks,
    and the weights that config.sources gives. Nothing is written.

    Raises:
      FileNotFoundError, ValueError: as the runs themselves.
    """
    left = [
        (folder, one)
        for folder, one in plan(config, workdir)
        if not (workdir / folder / "result.json").exists()
    ]
    if not left:
        return
    for source in given_sources():
        if source.value(config):
            check_source(config, source.field, mesh)
    splits = load_splits(config)  # of all runs
    trainings = []
    for folder, one in left:
        phase = PHASES[one.phase]
        with in_recipe(Recipe, one.phase):
            training = phase.describe(one, mesh)
            trainings.append((training, phase.feed(training, workdir / folder, splits)))
    for trace in (False, True):  # the quick checks of all runs first
        for training, feed in trainings:
            phase = training.config.phase
            with in_recipe(Recipe, phase):
                check_training(training, feed, mesh, key=f"config.recipes.{phase}", trace=trace)


def plan(config: Config, workdir: epath.Path) -> list[tuple[str, Config]]:
    """The runs of the pipeline in order: the folder of each below `workdir`, and its config.

    Raises:
      ValueError: when a phase has no recipe and is not optional.
    """
    made = {source.field: source.value(config) for source in given_sources()}
    runs = []
    for name in chosen_phases(config):
        phase = PHASES[name]
        sources = phase.used_sources(config)
        taken = {one.field: made[one.field] for one in sources if one.field in made}
        run_config = _phase_config(config, name, taken)
        if phase.modular:
            programs = program_folders(run_config, one=phase.folder, several=phase.role)
            made[phase.makes] = _of_stages(programs, workdir)
        else:
            programs = {phase.folder: run_config}
            made[phase.makes] = str(workdir / phase.folder)
        runs += programs.items()
    return runs


def chosen_phases(config: Config) -> list[str]:
    """The phases that the pipeline runs, in order.

    Counted from the last one: a phase runs where a later one takes its weights and config.sources
    does not give them, and an optional one where it has a recipe.

    Raises:
      ValueError: when one of them has no recipe.
    """
    given = {source.field for source in given_sources() if source.value(config)}
    needed, chosen = {PRODUCT}, []
    for name, phase in reversed(PHASES.items()):
        if name in config.recipes if phase.optional else phase.makes in needed - given:
            chosen.insert(0, name)
            needed |= {source.field for source in phase.used_sources(config)}
    if missing := [name for name in chosen if name not in config.recipes]:
        raise ValueError(f"config.recipes lacks {missing}, which phase='pipeline' needs")
    return chosen


def _of_stages(programs: dict[str, Config], workdir: epath.Path) -> tuple[str, ...]:
    """The workdir of each stage's module."""
    folders = {stage: folder for folder, one in programs.items() for stage in one.modules()}
    return tuple(str(workdir / folders[stage]) for stage in sorted(folders))


def _phase_config(config: Config, phase: str, sources: Mapping[str, Any]) -> Config:
    recipe = config.recipes[phase]
    with under("config"):
        return dataclasses.replace(
            config,
            phase=phase,
            module="all",
            optim=recipe.optim,
            augment=recipe.augment,
            drop_path=recipe.drop_path,
            recipes={},
            sources=dataclasses.replace(config.sources, **sources),
        )
