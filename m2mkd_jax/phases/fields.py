"""The config fields that each phase reads, and those that name sources of weights."""

import dataclasses
import logging
from collections.abc import Iterator

from common_jax.command_line import unread
from common_jax.config import is_set
from common_jax.optim import idle_optim
from common_jax.ranges import shown
from m2mkd_jax.config import Config
from m2mkd_jax.data.augment import idle_fields
from m2mkd_jax.families import family_of
from m2mkd_jax.losses import DISTILLATIONS
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.phase import ALLOWANCES, ALWAYS, WeightSource
from m2mkd_jax.regularizers import is_on


def reads() -> dict[str, tuple[str, ...]]:
    """Config sections and fields that each phase, and the pipeline, reads; setting any others has
    no effect."""
    table = {name: phase.all_reads() for name, phase in PHASES.items()}
    sections = dict.fromkeys(
        path.split(".")[0]
        for phase in PHASES.values()
        for path in (*phase.reads, *(("ood",) if phase.ood else ()))
    )
    del sections["module"]  # a pipeline always trains all modules
    paths = tuple(source.path for source in (*replacing_sources(), *given_sources()))
    return table | {"pipeline": (*ALWAYS, *sections, *paths, *ALLOWANCES, "recipes")}


def idle(config: Config) -> dict[str, str]:
    """Why a field that is set, and that the phase reads, has no effect given the other fields; by
    field path."""
    pipeline, side = config.phase == "pipeline", config.data.image_size
    recipes = {f"recipes.{name}.augment": one.augment for name, one in config.recipes.items()}
    augments = recipes if pipeline else {"augment": config.augment}
    sections = {path: idle_fields(one, side) for path, one in augments.items()}
    found = {
        f"{section}.{name}": why for section, own in sections.items() for name, why in own.items()
    }
    found |= idle_optim(config, pipeline=pipeline)
    found |= {path: why for path, why in _without_effect(config) if is_set(config, path)}
    # `app.run` warns of fields that the phase never reads; a second reason would only confuse.
    read = reads()[config.phase]
    found = {path: why for path, why in found.items() if not unread([path], read)}
    if config.module != "all" and (pipeline or not PHASES[config.phase].modular):
        # Also given as an argument of the config file, which no check of flags sees.
        found["module"] = f"phase={config.phase!r} does not train single modules"
    return found


def warn_of_networks(config: Config) -> None:
    """Logs the warnings of the student's family about config.model, if the phase reads it, and one
    if a pipeline puts a given teacher's modules into a new meta model."""
    if not unread(["model"], reads()[config.phase]):
        for warning in family_of(config.model).warnings(config.model):
            logging.warning("config.model.%s", warning)
    given = config.sources
    if config.phase == "pipeline" and config.distill.active and given.teacher and not given.meta:
        logging.warning(
            "config.sources.teacher=%s teaches inside a meta model that this pipeline trains from "
            "scratch: give config.sources.meta, the one that its modules were trained in, or it "
            "will be a poor teacher",
            given.teacher,
        )


def _without_effect(config: Config) -> Iterator[tuple[str, str]]:
    """Yields fields and sections that the other fields switch off, whether set or not, and why."""
    for name in ("distill", "baseline"):
        section = getattr(config, name)
        if section.active:
            unused = DISTILLATIONS[section.kind].idle
        else:
            unused = dict.fromkeys(("alpha", "tau", "combine"), "distills nothing")
        for field, why in unused.items():
            yield f"{name}.{field}", f"config.{name}.kind={section.kind!r} {why}"
        if section.active and len(config.sources.teachers) < 2:
            yield f"{name}.combine", "there is only one teacher"
    if not config.ood.source:
        why = "config.ood.source is empty, so there is no OOD set"
        yield from ((f"ood.{name}", why) for name in ("path", "split", "name", "classes"))
    if config.data.train_split == config.data.test_split:
        yield "data.test_per_class", "config.data.train_split and test_split are the same"
    if not config.data.test_share:
        yield "data.split_seed", "config.data.test_share=0 draws no split"
    family = family_of(config.model)
    yield from ((f"model.{path}", why) for path, why in family.idle(config.model).items())
    if family.preparation is None:
        yield "regularizers", "it is for networks that start from a graph, such as a NAC"
    else:
        yield from _without_weight(config)
    if not family.evaluation_streams:  # no other network in a run has any
        yield "evaluation.noise", "these networks draw nothing in evaluation"
    if not family.modules_drop(config.model):
        path = {"pipeline": "recipes.distill.drop_path", "distill": "drop_path"}.get(config.phase)
        if path == "drop_path" or (path and "distill" in config.recipes):
            yield path, "it ramps up from 0 within each student, and these have one block"
    if config.phase != "pipeline":
        used = [source.path for source in used_sources(config)]
        for source in PHASES[config.phase].sources:
            if source.path not in used and source.section == "sources":
                why = "the other fields leave it out"
                name = "distill" if config.phase == "distill" else "baseline"
                if not getattr(config, name).active and source.path.startswith("sources.teacher"):
                    why = f"config.{name}.kind='none' uses no teacher"
                yield source.path, why


def _without_weight(config: Config) -> Iterator[tuple[str, str]]:
    """The other fields of regularisers whose weight is 0."""
    for name in (field.name for field in dataclasses.fields(config.regularizers)):
        term, key = getattr(config.regularizers, name), f"regularizers.{name}"
        for field in () if is_on(term) else dataclasses.fields(term):
            if not field.name.startswith("weight"):
                yield f"{key}.{field.name}", f"config.{key}.weight=0 leaves it out"


def replacing_sources() -> tuple[WeightSource, ...]:
    """The sources that replace phases of a pipeline if they are given."""
    return tuple(WeightSource(phase.makes) for phase in PHASES.values() if phase.replaceable)


def given_sources() -> tuple[WeightSource, ...]:
    """The sources that no phase of a pipeline produces; each field once."""
    sources = [s for phase in PHASES.values() for s in phase.sources if not s.made]
    return tuple({source.path: source for source in sources}.values())


def used_sources(config: Config) -> tuple[WeightSource, ...]:
    """The sources that a run of `config` takes weights from."""
    if config.phase == "pipeline":
        return (*replacing_sources(), *(s for s in given_sources() if s.value(config)))
    return PHASES[config.phase].used_sources(config)


def check_sources(config: Config) -> None:
    """Raises ValueError for a source outside config.sources, such as config.init.upcycle, that the
    phase does not read: the run would silently start from other weights. Also if a pipeline is
    given sources.teachers but no meta model: it would train a new one, which they do not fit."""
    table = reads()
    if config.phase == "pipeline" and config.sources.teachers and not config.sources.meta:
        raise ValueError(
            f"config.sources.teachers={shown(config.sources.teachers)} needs config.sources.meta: "
            "give the meta model that their modules were trained in"
        )
    for source in (source for phase in PHASES.values() for source in phase.sources):
        value = source.value(config)
        if source.section != "sources" and value and source.path not in table[config.phase]:
            readers = [name for name, paths in table.items() if source.path in paths]
            raise ValueError(
                f"config.{source.path}={shown(value)} is for phase="
                f"{' or '.join(map(repr, readers))}, not phase={config.phase!r}: leave it out"
            )
