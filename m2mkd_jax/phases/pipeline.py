"""All phases in order, each in a folder of its own: resumable, and skipped when finished."""

import dataclasses
import json
import logging
from types import ModuleType
from typing import Any

from etils import epath
from jax.sharding import Mesh

from common_jax.config import unfreeze
from common_jax.loop import claim
from m2mkd_jax.config import Config
from m2mkd_jax.phases import assemble, distill, end_to_end, few_shot, pretrain_meta, train_module
from m2mkd_jax.phases.training import Training

# Phases that train one network, and those that train one module a call. Each has a `describe`, for
# what it trains, and a `run`.
WHOLE: dict[str, ModuleType] = {
    "pretrain_meta": pretrain_meta,
    "assemble": assemble,
    "end_to_end": end_to_end,
    "few_shot": few_shot,
}
MODULAR: dict[str, ModuleType] = {"train_module": train_module, "distill": distill}


def run_phase(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Runs the phase that `config` names.

    A modular phase trains the modules of config.module one after the other: a single one in
    `workdir` itself, several in `workdir`/module_K.

    Returns:
      The result of the run, or of the last one.
    """
    if config.phase == "pipeline":
        return run_pipeline(config, workdir, mesh)
    if config.phase in WHOLE:
        return WHOLE[config.phase].run(config, workdir, mesh)
    stages, result = config.modules(), {}
    for stage in stages:
        folder = workdir if len(stages) == 1 else workdir / f"module_{stage}"
        one = dataclasses.replace(config, module=str(stage))
        result = MODULAR[config.phase].run(one, folder, mesh, stage)
    return result


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
    stages = config.modules()
    if len(stages) > 1:
        raise ValueError(
            f"config.module={config.module!r} is {len(stages)} runs, each with a program of its "
            f"own: name one of the stages {list(stages)}"
        )
    return MODULAR[config.phase].describe(config, mesh, stages[0])


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
    claim(workdir, unfreeze(config).to_dict())
    results = {}
    for folder, run_config in plan(config, workdir):
        done = workdir / folder / "result.json"
        if done.exists():
            logging.info("%s is finished already", folder)
            results[folder] = json.loads(done.read_text())
        else:
            results[folder] = run_phase(run_config, workdir / folder, mesh)
    return results["end_to_end"]


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
    stages = range(len(config.meta.depths))
    modules = tuple(str(workdir / f"module_{stage}") for stage in stages)
    students = tuple(str(workdir / f"student_{stage}") for stage in stages)
    meta = given.meta or str(workdir / "meta")
    teacher = given.teacher or str(workdir / "teacher")

    runs = [] if given.meta else [("meta", _phase(config, "pretrain_meta"))]
    if not given.teacher:
        runs += [
            (f"module_{stage}", _phase(config, "train_module", module=str(stage), meta=meta))
            for stage in stages
        ]
        runs.append(("teacher", _phase(config, "assemble", modules=modules)))
    runs += [
        (
            f"student_{stage}",
            _phase(config, "distill", module=str(stage), meta=meta, teacher=teacher),
        )
        for stage in stages
    ]
    whole = {"students": students} | (
        {"teacher": teacher} if config.baseline.kind != "none" else {}
    )
    runs.append(("end_to_end", _phase(config, "end_to_end", **whole)))
    if "few_shot" in config.recipes:
        network = str(workdir / "end_to_end")
        runs.append(("few_shot", _phase(config, "few_shot", network=network)))
    return runs


def _phase(
    config: Config, phase: str, *, module: str = "all", **sources: str | tuple[str, ...]
) -> Config:
    recipe = config.recipes[phase]
    return dataclasses.replace(
        config,
        phase=phase,
        module=module,
        optim=recipe.optim,
        augment=recipe.augment,
        drop_path=recipe.drop_path,
        recipes={},
        sources=dataclasses.replace(config.sources, **sources),
    )
