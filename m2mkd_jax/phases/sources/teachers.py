"""Teachers: the one that config.teacher describes, or several from other runs, each with a config
section of its own."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from common_jax import checkpoint
from common_jax.command_line import check_system
from common_jax.config import renamed
from common_jax.weights import Origin
from common_jax.workdir import freeze_stored, read_json
from m2mkd_jax.config import SYSTEM, Config
from m2mkd_jax.families import FAMILIES, family_of
from m2mkd_jax.models.bridge import Layout
from m2mkd_jax.phases.networks import (
    SECTIONS,
    bridge,
    family_of_role,
    parameter_shapes,
    stitched_modules,
    teacher_network,
    token_layout,
)
from m2mkd_jax.phases.sources.weights import COMPUTATION, take_weights
from m2mkd_jax.phases.training import find_classes
from m2mkd_jax.stages import Network

ACCOUNT = "teachers.json"


@dataclasses.dataclass(frozen=True)
class StoredTeacher:
    """A teacher from another run.

    Attributes:
      key: config field that names the other run.
      source: the other run's workdir, or a step in it.
      role: key of its parameters.
      stored: the other run's config.
      config: this run's config, with the teacher's section as config.teacher.
    """

    key: str
    source: str
    role: str
    stored: Config
    config: Config

    @property
    def joined(self) -> bool:
        """True for modules with stitches to a meta model."""
        return self.role == "module" and bool(self.stored.init.teacher)

    @property
    def converts(self) -> bool:
        """True if tokens must be converted between the layouts of the meta model and its own."""
        own, outer = self.layouts()
        # Modules trained from scratch already take the meta model's tokens as they are.
        return own != outer and (self.joined or self.role != "module")

    def layouts(self) -> tuple[Layout, Layout]:
        """The token layouts between its own stages and between the meta model's stages."""
        config = self.config
        return token_layout(config, config.teacher), token_layout(config, config.meta)

    def refuse(self, problem: str) -> ValueError:
        """An error whose message begins with the config field and the workdir."""
        return ValueError(f"{self.key}={self.source!r} {problem}")

    def whole(self) -> Network:
        """The whole network; raises ValueError for a run of single modules."""
        if self.role == "module":
            raise self.refuse(
                f"holds modules, but a whole {family_of(self.config.teacher).files.network} is "
                "needed: give a run of phase='assemble', or converted weights"
            )
        with renamed({"config.teacher": self.key}):
            return teacher_network(self.config)

    def modules(self) -> Network:
        """Its modules, which exchange tokens with the meta model; raises ValueError if they do not
        fit it."""
        meta, section = self.config.meta, self.config.teacher
        if len(section.depths) != len(meta.depths):
            raise self.refuse(
                f"is cut into {section.depths} blocks, but config.meta.depths={meta.depths}: both "
                "must have the same number of stages. Convert or train it again with other "
                "--config.teacher.depths"
            )
        # A joined module's stitches are as wide as the meta model that it was joined to.
        width = self.stored.meta.width if self.joined else section.width
        if width != meta.width:
            raise self.refuse(
                f"fits a meta model of width {width}, but config.meta.width={meta.width}: join its "
                "modules to this meta model with phase=train_module and --config.init.teacher, "
                "which trains stitches, and give that run"
            )
        with renamed({"config.teacher": self.key}):
            network = (stitched_modules if self.joined else teacher_network)(self.config)
            return bridge(self.config, network) if self.converts else network

    def require_section(self, config: Config) -> None:
        """Raises ValueError if config.teacher describes a different network."""
        own, given = (dataclasses.asdict(one.teacher) for one in (self.config, config))
        if differing := [name for name in own if own[name] != given[name]]:
            text = {name: str(own[name]).replace(" ", "") for name in differing}
            flags = " ".join(f"--config.teacher.{name}='{text[name]}'" for name in differing)
            raise self.refuse(f"is not the network that config.teacher describes: give {flags}")


@dataclasses.dataclass(frozen=True)
class Teachers:
    """The teachers of a run.

    Attributes:
      networks: the networks, by the key of their parameters.
      configs: by the same key, this run's config with that teacher's section as config.teacher.
      taught_by: by stage, the keys of the teachers of its module; {} for whole networks, which all
        teach the whole student.
    """

    networks: Mapping[str, Network]
    configs: Mapping[str, Config]
    taught_by: Mapping[int, tuple[str, ...]]

    def shapes(self, mesh: Mesh) -> dict[str, Any]:
        """Shapes and shardings of the parameters that the run needs, by key."""
        shapes = {}
        for name, network in self.networks.items():
            stages = tuple(stage for stage, names in self.taught_by.items() if name in names)
            # A teacher without a student among this program's modules is not loaded.
            if stages or not self.taught_by:
                only, own = stages or None, self.configs[name]
                part = parameter_shapes(own, network, "teacher", mesh, only=only)
                shapes[name] = part["teacher"]
        return shapes


def module_teachers(config: Config) -> Teachers:
    """The teacher modules of the students in config.module, as config.distill.teachers assigns
    them; none if nothing is distilled."""
    stages, names = config.modules(), teacher_names(config)
    if not config.distill.active:
        return Teachers({}, {}, dict.fromkeys(stages, ()))
    if not config.sources.teachers:
        networks, configs = {"teacher": teacher_network(config)}, {"teacher": config}
        return Teachers(networks, configs, dict.fromkeys(stages, names))
    found, table = read_teachers(config), config.taught_by()
    return Teachers(
        {name: one.modules() for name, one in found.items()},
        {name: one.config for name, one in found.items()},
        {stage: tuple(names[i] for i in table[stage]) for stage in stages},
    )


def whole_teachers(config: Config) -> Teachers:
    """The whole networks whose logits teach the whole student."""
    if not config.sources.teachers:
        return Teachers({"teacher": teacher_network(config)}, {"teacher": config}, {})
    found = read_teachers(config)
    return Teachers(
        {name: one.whole() for name, one in found.items()},
        {name: one.config for name, one in found.items()},
        {},
    )


def teacher_names(config: Config) -> tuple[str, ...]:
    """The parameter key of each teacher; "teacher" if there is only config.teacher. A run that
    config.sources.teachers names twice gets a single key, so it is loaded and run once."""
    sources = config.sources.teachers
    return tuple(f"teacher_{sources.index(source)}" for source in sources) or ("teacher",)


def read_teachers(config: Config) -> dict[str, StoredTeacher]:
    """The networks of config.sources.teachers, by the keys of their parameters; reads no arrays.

    Raises:
      FileNotFoundError: if one has no finished checkpoint.
      ValueError: if one cannot be a teacher, or has a different number of classes.
    """
    found = {}
    for i, source in enumerate(config.sources.teachers):
        name = teacher_names(config)[i]
        if name not in found:
            found[name] = read_teacher(config, f"config.sources.teachers[{i}]", source)
            labels = found[name].stored.data.labels
            if labels != config.data.labels:
                raise found[name].refuse(
                    f"has {labels} classes, but config.data.labels={config.data.labels}: a teacher "
                    "needs the student's classes. Join it with phase=train_module, "
                    r"--config.init.teacher and --config.sources.fresh='module/stage_\d+/head/.*', "
                    "which trains a new head"
                )
    return found


def read_teacher(config: Config, key: str, source: str) -> StoredTeacher:
    """The teacher in another run; raises FileNotFoundError if that run has no finished checkpoint,
    and ValueError if its network is of a family that cannot be a teacher.

    Args:
      config: this run's config.
      key: config field that names the other run.
      source: the other run's workdir, or a step in it.
    """
    checkpoint.check_source(key, source)
    saved, shapes = checkpoint.load_config(source), checkpoint.load_shapes(source)
    # Before freezing, whose complaint about the other system's fields would be of less help.
    check_system(saved, SYSTEM, source)
    stored = freeze_stored(Config, saved, source)
    able = [role for role in SECTIONS if "teacher" in family_of_role(stored, role).roles]
    # A whole teacher is preferred to modules, and modules to a meta model.
    role = next((role for role in reversed(able) if role in shapes), None)
    if role is None:
        kinds = [one.files.network for one in FAMILIES.values() if "teacher" in one.roles]
        raise ValueError(
            f"{key}={source!r} holds {sorted(shapes)}, but a {' or '.join(kinds)} is needed: give "
            "a run of phase='train_module' or 'assemble', or converted weights"
        )
    section = getattr(stored, SECTIONS[role])
    # How to compute it depends on this run's machine, not on the one that trained it.
    own = {name: getattr(config.teacher, name) for name in COMPUTATION}
    teacher = dataclasses.replace(section, **own)
    return StoredTeacher(key, source, role, stored, dataclasses.replace(config, teacher=teacher))


def load_teachers(
    config: Config, shapes: Mapping[str, Any], *, read: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads those of config.sources.teachers that `shapes` asks for.

    Args:
      config: the run's config.
      shapes: shapes and shardings of parameters by key; keys that are not teachers are ignored.
      read: if False, only checks that all parameters fit, and returns none.

    Returns:
      Their parameters; and by config field a record of each teacher: its network, how it is joined
      to the meta model, and which parameters were reshaped.

    Raises:
      FileNotFoundError, ValueError: like `read_teachers` and `take_weights`.
    """
    params, account = {}, {}
    for name, found in read_teachers(config).items():
        if name not in shapes:
            continue
        origins = [
            Origin(found.source, f"{found.role}/{stage}", f"teacher/{stage}")
            for stage in shapes[name]
        ]
        _compare_meta(found)
        # In the role "teacher", since in `found.config` the section of that role is this teacher's:
        # position tables are resized by it.
        needed = {"teacher": shapes[name]}
        start = take_weights(found.config, needed, origins, frozen=True, read=read)
        if read:
            params[name] = start.params["teacher"]
        own, outer = found.layouts()
        account[found.key] = {
            "network": dataclasses.asdict(found.config.teacher),
            "stages": list(shapes[name]),
            "stitches": found.joined,
            "tokens": {"teacher": str(own), "meta": str(outer), "converted": found.converts},
            **start.account,
        }
        logging.info("%s=%s teaches %s", found.key, found.source, ", ".join(shapes[name]))
    return params, account


def _compare_meta(found: StoredTeacher) -> None:
    """Warns about modules that were trained in another meta model. Only paths are compared, so a
    meta model whose folder was moved causes the warning too."""
    theirs, ours = found.stored.sources.meta, found.config.sources.meta
    if found.role == "module" and checkpoint.absolute(theirs) != checkpoint.absolute(ours):
        logging.warning(
            "%s=%s was trained in the meta model of %s, but config.sources.meta=%s: unless these "
            "are the same model, it will be a poor teacher",
            *(found.key, found.source, theirs, ours),
        )


def check_classes(config: Config, names: Sequence[str], roles: Sequence[str]) -> None:
    """Raises ValueError if a frozen network was trained on classes with other names, or in another
    order, than `names`. Weights without class names, such as most converted ones, are
    not checked.

    Args:
      config: the run's config.
      names: the classes of the run's data, in order.
      roles: fields of config.sources, such as "meta" and "teachers"; empty ones are skipped.
    """
    for role in roles:
        given = getattr(config.sources, role)
        several = isinstance(given, tuple)
        for i, source in enumerate(given if several else [given]):
            path = find_classes(checkpoint.find_step(source)) if source else None
            known = names if path is None else read_json(path, {"names": list})["names"]
            # Not strict: a different number of classes shows in the shapes of the head, or is
            # refused by `read_teachers`.
            for label, (theirs, ours) in enumerate(zip(known, names, strict=False)):
                if theirs != ours:
                    key = f"config.sources.{role}" + (f"[{i}]" if several else "")
                    raise ValueError(
                        f"{key}={source!r} calls class {label} {theirs!r}, but config.data calls "
                        f"it {ours!r}: a frozen network needs this run's classes in the same order"
                    )
