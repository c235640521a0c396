"""All phases in order, each in a folder of its own: resumable, and skipped when finished."""

import dataclasses
import logging
from types import ModuleType
from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.config import in_recipe, under
from common_jax.workdir import claim, read_result, refuse_other_config
from m2mkd_jax.config import Config, Recipe
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.phases import assemble, distill, end_to_end, few_shot, pretrain_meta, train_module
from m2mkd_jax.phases.circuit import check_circuit
from m2mkd_jax.phases.networks import check_source
from m2mkd_jax.phases.training import Training, check_training, config_feed

# Phases that train one network, and those that train the modules of config.module. Each has a
# `describe`, for what it trains, and a `run`.
WHOLE: dict[str, ModuleType] = {
    "pretrain_meta": pretrain_meta,
    "assemble": assemble,
    "end_to_end": end_to_end,
    "few_shot": few_shot,
}
MODULAR: dict[str, ModuleType] = {"train_module": train_module, "distill": distill}
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
    if config.phase == "pipeline":
        return run_pipeline(config, workdir, mesh)
    if config.phase in WHOLE:
        return WHOLE[config.phase].run(config, workdir, mesh)
    result = {}
    for folder, part in program_folders(config, one="", several="module").items():
        result = MODULAR[config.phase].run(part, workdir / folder, mesh)
    return result


def program_folders(config: Config, *, one: str, several: str) -> dict[str, Config]:
    """The programs of a modular phase, each by the folder it trains in: `one` where there is one,
    `several`_0+1 and so on where there are several."""
    programs = config.programs()
    if len(programs) == 1:
        return {one: programs[0]}
    return {f"{several}_{program.module}": program for program in programs}


def describe(config: Config, mesh: Mesh) -> Training:
    """What the one run of `config` trains.

    Raises:
      ValueError: where `config` means several runs.
    """
    if config.phase == "pipeline":
        raise ValueError(
            "config.phase='pipeline' is several runs, each with a program of its own: name one of "
            f"{[*WHOLE, *MODULAR]}"
        )
    if config.phase in WHOLE:
        return WHOLE[config.phase].describe(config, mesh)
    if len(programs := config.programs()) > 1:
        raise ValueError(
            f"config.module={config.module!r} with config.distill.pairs_at_once="
            f"{config.distill.pairs_at_once} is {len(programs)} programs: name the modules of one "
            f"of them, {[program.module for program in programs]}"
        )
    return MODULAR[config.phase].describe(config, mesh)


def run_pipeline(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Meta model, teacher modules, teacher, student modules, whole student and, if it has a
    recipe, few-shot.

    Every run gets the recipe of its phase from config.recipes and the weights of the runs before
    it. Where config.sources.meta or config.sources.teacher name a finished one, it is taken and
    not trained. few_shot is left out where it has no recipe.

    Returns:
      The result of the end-to-end run.
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
    return results["end_to_end"]


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
    for role in ("meta", "teacher"):
        if getattr(config.sources, role):
            check_source(config, role, mesh)
    sources = few_shot.load_splits(config)  # of all runs
    trainings = []
    for folder, one in left:
        with in_recipe(Recipe, one.phase):
            if one.phase == "few_shot":
                training, feed = few_shot.check_episodes(one, mesh, sources)
            else:
                training, feed = describe(one, mesh), config_feed(one, workdir / folder, sources)
            if one.phase == "end_to_end" and isinstance(one.model, NacConfig):
                check_circuit(one)
        trainings.append((training, feed, one.phase))
    for trace in (False, True):  # what is quick to see first
        for training, feed, phase in trainings:
            with in_recipe(Recipe, phase):
                check_training(training, feed, mesh, key=f"config.recipes.{phase}", trace=trace)


def plan(config: Config, workdir: epath.Path) -> list[tuple[str, Config]]:
    """The runs of the pipeline in order: the folder of each below `workdir`, and its config.

    Raises:
      ValueError: when a phase has no recipe; few_shot may lack one, and is then left out.
    """
    given = config.sources
    needed = () if given.meta else ("pretrain_meta",)
    needed += () if given.teacher else ("train_module", "assemble")
    needed += ("distill", "end_to_end")
    if missing := [phase for phase in needed if phase not in config.recipes]:
        raise ValueError(f"config.recipes lacks {missing}, which phase='pipeline' needs")
    meta = given.meta or str(workdir / "meta")
    teacher = given.teacher or str(workdir / "teacher")

    runs = [] if given.meta else [("meta", _phase(config, "pretrain_meta"))]
    if not given.teacher:
        phase = _phase(config, "train_module", meta=meta)
        modules = program_folders(phase, one="modules", several="module")
        sources = _of_stages(modules, workdir)
        runs += [*modules.items(), ("teacher", _phase(config, "assemble", modules=sources))]
    phase = _phase(config, "distill", meta=meta, teacher=teacher)
    students = program_folders(phase, one="students", several="student")
    runs += students.items()
    whole = {"students": _of_stages(students, workdir)}
    if config.baseline.kind != "none":
        whole["teacher"] = teacher
    runs.append(("end_to_end", _phase(config, "end_to_end", **whole)))
    if "few_shot" in config.recipes:
        network = str(workdir / "end_to_end")
        runs.append(("few_shot", _phase(config, "few_shot", network=network)))
    return runs


def _of_stages(programs: dict[str, Config], workdir: epath.Path) -> tuple[str, ...]:
    """The workdir that holds each stage."""
    held = {stage: folder for folder, one in programs.items() for stage in one.modules()}
    return tuple(str(workdir / held[stage]) for stage in sorted(held))


def _phase(config: Config, phase: str, **sources: str | tuple[str, ...]) -> Config:
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
