"""The config fields that each phase reads, and those that name sources of weights."""

from common_jax.command_line import unread
from common_jax.optim import idle_optim
from common_jax.ranges import shown
from m2mkd_jax.config import Config
from m2mkd_jax.data.augment import idle_fields
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.phase import ALLOWANCES, ALWAYS, WeightSource


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
    sections = {"augment": idle_fields(config.augment, config.data.image_size)}
    if hasattr(config.model, "moe"):
        sections["model.moe"] = config.model.moe.idle
    found = {
        f"{section}.{name}": why for section, own in sections.items() for name, why in own.items()
    }
    found |= idle_optim(config, pipeline=config.phase == "pipeline")
    read = reads()[config.phase]
    return {path: why for path, why in found.items() if not unread([path], read)}


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
