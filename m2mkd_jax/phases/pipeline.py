"""Running one phase, or the pipeline: all phases in order, each in a folder of its own, resumed if
interrupted and skipped if finished."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.config import in_recipe, under
from common_jax.nn.dense import matmul_precision
from common_jax.workdir import claim, read_result, refuse_other_config, unfinished
from m2mkd_jax.config import Config, Recipe
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.few_shot import load_splits
from m2mkd_jax.phases.fields import check_sources, replacing_sources
from m2mkd_jax.phases.phase import Splits, Training
from m2mkd_jax.phases.sources.teachers import load_teachers
from m2mkd_jax.phases.training import check_training

# The field of config.sources for the network that a pipeline always trains; the result of that run
# is the pipeline's result.
PRODUCT = "network"
# Fields in which a finished run may differ from the plan: the sources are elsewhere if the pipeline
# was moved, and an episode has its own number of labels.
APART = r"sources\..*|data\.labels"


def run_phase(
    config: Config, workdir: epath.Path, mesh: Mesh, splits: Splits | None = None
) -> dict[str, Any]:
    """Runs the phase that `config` names; returns the result of its run, or of its last one.

    A modular phase trains all modules in config.module with one program, in `workdir` itself. If
    config.distill.pairs_at_once allows fewer, several programs run one after another, each in its
    own folder such as `workdir`/module_0+1. `splits` are the images of config.data if they are
    already loaded; a pipeline loads its own.
    """
    check_sources(config)
    if config.phase == "pipeline":
        return run_pipeline(config, workdir, mesh)
    phase, folders = PHASES[config.phase], run_folders(config)
    result = {}
    with matmul_precision(config.matmul_precision):
        if len(folders) > 1:
            splits = splits or load_splits(config)  # shared by all programs
            _check_programs(folders, workdir, mesh, splits)
        for folder, part in folders.items():
            result = phase.run(part, workdir / folder, mesh, splits)
    return result


def _check_programs(
    programs: Mapping[str, Config], workdir: epath.Path, mesh: Mesh, splits: Splits
) -> None:
    """Checks all programs of a phase, by folder, before the first one trains."""
    for folder, config in programs.items():
        phase = PHASES[config.phase]
        training = phase.describe(config, mesh)
        feed = phase.feed(training, workdir / folder, splits)
        check_training(training, feed, mesh, trace=False)


def program_folders(config: Config, *, one: str, several: str) -> dict[str, Config]:
    """The programs of a modular phase by folder: `one` for a single program; `several`_0+1 and so
    on for several."""
    programs = config.programs()
    if len(programs) == 1:
        return {one: programs[0]}
    return {f"{several}_{program.module}": program for program in programs}


def run_folders(config: Config) -> dict[str, Config]:
    """The runs of one phase by folder below its workdir; "" is the workdir itself."""
    if not PHASES[config.phase].modular:
        return {"": config}
    return program_folders(config, one="", several="module")


def describe(config: Config, mesh: Mesh) -> Training:
    """The training of the single run of `config`; raises ValueError if `config` has several."""
    check_sources(config)
    if config.phase == "pipeline":
        raise ValueError(
            "config.phase='pipeline' has several runs, each with its own program: name one of "
            f"{list(PHASES)}"
        )
    if PHASES[config.phase].modular and len(programs := config.programs()) > 1:
        raise ValueError(
            f"config.module={config.module!r} with config.distill.pairs_at_once="
            f"{config.distill.pairs_at_once} has {len(programs)} programs: name the modules of one "
            f"of them, {[program.module for program in programs]}"
        )
    return PHASES[config.phase].describe(config, mesh)


def run_pipeline(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Runs the phases in the order of `PHASES`, see `chosen_phases`.

    Every run gets its phase's recipe from config.recipes, and weights from earlier runs.

    Returns:
      The result of the run that trains `PRODUCT`.
    """
    workdir = epath.Path(workdir)
    # All checks come before `claim`, which writes to the workdir: a pipeline that is refused leaves
    # no config there.
    refuse_other_config(workdir, config)
    splits = check_pipeline(config, workdir, mesh)
    claim(workdir, config)
    results, runs = {}, plan(config, workdir)
    for number, (folder, run_config) in enumerate(runs, 1):
        logging.info("phase %d of %d: %s", number, len(runs), folder)
        result = read_result(workdir / folder, run_config, phase=run_config.phase, apart=APART)
        if result is not None:
            logging.info("%s is already finished", folder)
            results[folder] = result
        else:
            # Errors then name the field under config.recipes, where it was set.
            with in_recipe(Recipe, run_config.phase):
                results[folder] = run_phase(run_config, workdir / folder, mesh, splits)
    return results[result_folder()]


def result_folder() -> str:
    """The folder of the run whose result is the result of the pipeline."""
    return next(phase.folder for phase in PHASES.values() if phase.makes == PRODUCT)


def check_pipeline(config: Config, workdir: epath.Path, mesh: Mesh) -> Splits | None:
    """Checks data, recipes, networks and source weights of all unfinished runs; writes nothing. All
    processes must call this together.

    Returns:
      The images, loaded once for all runs; None if all are finished.

    Raises:
      FileNotFoundError, ValueError: like the runs themselves.
    """
    runs = unfinished(workdir, plan(config, workdir))
    if not runs:
        return None
    splits = load_splits(config)  # shared by all runs
    trainings = []
    for folder, run in runs:
        phase = PHASES[run.phase]
        with in_recipe(Recipe, run.phase):
            training = phase.describe(run, mesh)
            trainings.append((training, phase.feed(training, workdir / folder, splits)))
    planned = {}
    for (folder, run), (training, _) in zip(runs, trainings, strict=True):
        with in_recipe(Recipe, run.phase):
            load_teachers(training.config, training.helpers, read=False)
            # A source that an earlier run has yet to make counts as made.
            PHASES[run.phase].fit(training, planned)
        planned[str(workdir / folder)] = training.shapes
    for trace in (False, True):  # quick checks of all runs come before slow ones
        for training, feed in trainings:
            phase = training.config.phase
            with in_recipe(Recipe, phase):
                check_training(training, feed, mesh, key=f"config.recipes.{phase}", trace=trace)
    return splits


def plan(config: Config, workdir: epath.Path) -> list[tuple[str, Config]]:
    """The runs of the pipeline in order, each as its folder below `workdir` and its config.

    Raises:
      ValueError: if a phase that is not optional has no recipe.
    """
    workdirs = {source.field: source.value(config) for source in replacing_sources()}
    runs = []
    for name in chosen_phases(config):
        phase = PHASES[name]
        fields = [source.field for source in phase.used_sources(config)]
        # Sources that no phase makes, such as sources.teachers, stay as the user gave them.
        sources = {field: workdirs[field] for field in fields if field in workdirs}
        run_config = _phase_config(config, name, sources)
        if phase.modular:
            programs = program_folders(run_config, one=phase.folder, several=phase.role)
            workdirs[phase.makes] = _stage_workdirs(programs, workdir)
        else:
            programs = {phase.folder: run_config}
            workdirs[phase.makes] = str(workdir / phase.folder)
        runs += programs.items()
    return runs


def chosen_phases(config: Config) -> list[str]:
    """The phases that the pipeline runs, in order: those whose weights a later phase needs and
    config.sources does not provide, and optional ones that have a recipe.

    Raises:
      ValueError: if one of them has no recipe.
    """
    replaced = {source.field for source in replacing_sources() if source.value(config)}
    needed, chosen = {PRODUCT}, []
    # Backwards from the product, so that what later phases need is known.
    for name, phase in reversed(PHASES.items()):
        if name in config.recipes if phase.optional else phase.makes in needed - replaced:
            chosen.insert(0, name)
            needed |= {source.field for source in phase.used_sources(config)}
    if missing := [name for name in chosen if name not in config.recipes]:
        raise ValueError(f"config.recipes has no {missing}, which phase='pipeline' needs")
    return chosen


def _stage_workdirs(programs: dict[str, Config], workdir: epath.Path) -> tuple[str, ...]:
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
            # The run's recipe is in the three fields above; its config has no others.
            recipes={},
            sources=dataclasses.replace(config.sources, **sources),
        )
