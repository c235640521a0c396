"""Phase distill (m2mKD): student modules learn from teacher modules, each pair inside the meta
model."""

from typing import Any

from etils import epath
from jax import numpy as jnp
from jax.sharding import Mesh

from common_jax.weights import Origin, Planned, WarmStart
from m2mkd_jax.config import Config
from m2mkd_jax.hybrid import check_stages, teacher_and_student_logits
from m2mkd_jax.phases.networks import (
    check_exchange,
    family_of_role,
    meta_network,
    parameter_shapes,
    student_modules,
)
from m2mkd_jax.phases.objective import Outputs
from m2mkd_jax.phases.phase import FileKind, Phase, Splits, Training, WeightSource, config_feed
from m2mkd_jax.phases.sources.teachers import ACCOUNT, check_classes, load_teachers, module_teachers
from m2mkd_jax.phases.sources.weights import require_source, take_weights
from m2mkd_jax.phases.training import train_phase
from m2mkd_jax.stages import module_name, stage_name


def run(
    config: Config, workdir: epath.Path, mesh: Mesh, splits: Splits | None = None
) -> dict[str, Any]:
    """Trains the student modules of config.module and saves them under "student/stage_K"."""
    training = describe(config, mesh)
    helpers = _take_frozen(training).params
    feed = config_feed(training, workdir, splits)
    frozen = [source.field for source in PHASE.used_sources(config)]
    check_classes(config, feed.label_names, frozen)
    if "teachers" not in frozen:
        return train_phase(training, workdir, mesh, helpers=helpers, feed=feed)
    # Each from a run of its own, read with the config section of that run.
    teachers, account = load_teachers(config, training.helpers)
    files = {ACCOUNT: account}
    return train_phase(training, workdir, mesh, helpers=helpers | teachers, feed=feed, files=files)


def _take_frozen(training: Training, *, planned: Planned | None = None) -> WarmStart:
    """Loads the meta model and a single teacher; with `planned`, only checks that they fit."""
    config = training.config
    # Several teachers are under other keys, and are loaded by `load_teachers`.
    shapes = {role: part for role, part in training.helpers.items() if role in ("meta", "teacher")}
    origins = [Origin(require_source(config, "meta"), "meta", "meta")]
    if "teacher" in shapes:
        teacher = require_source(config, "teacher")
        # Only the stages that teach a student of this program; the original builds the whole
        # teacher.
        names = [f"teacher/{name}" for name in shapes["teacher"]]
        origins += [Origin(teacher, name, name) for name in names]
    return take_weights(config, shapes, origins, frozen=True, planned=planned)


def _fit(training: Training, planned: Planned) -> None:
    _take_frozen(training, planned=planned)


def describe(config: Config, mesh: Mesh) -> Training:
    """The student modules of config.module; the frozen meta model and the modules of one or more
    teachers are helpers."""
    several = bool(config.sources.teachers)
    stages, teachers = config.modules(), module_teachers(config)
    # The tokens of sources.teachers are converted where they differ, so those need no check.
    own = ("teacher",) if "teacher" in teachers.networks else ()
    check_exchange(config, "meta", *own, "student")
    # As in the original, only students have stochastic depth, not the meta model or the teachers.
    meta, students = meta_network(config), student_modules(config, drop_path=config.drop_path)
    check_stages({"meta": meta, "student": students} | teachers.networks)

    def join(targets):
        """The logits of a module's teachers, as the loss takes them."""
        if several and targets:
            return jnp.stack(targets)  # combined along the first axis
        return targets[0] if targets else None

    def forward(params, helpers, images, train, rngs):
        targets, logits, recorded = teacher_and_student_logits(
            meta,
            teachers.networks,
            students,
            {**helpers, **params},
            images,
            taught_by=teachers.taught_by,
            train=train,
            rngs=rngs,
        )
        return {
            module_name(stage): Outputs(
                logits[stage],
                join(targets[stage]),
                {stage_name(stage): recorded[stage_name(stage)]},
            )
            for stage in stages
        }

    return Training(
        PHASE,
        config,
        init=lambda key: {"student": students.init(key, only=stages)},
        rules=family_of_role(config, "student").rules,
        forward=forward,
        helpers=parameter_shapes(config, meta, "meta", mesh) | teachers.shapes(mesh),
        distill=config.distill,
    )


PHASE = Phase(
    describe=describe,
    run=run,
    role="student",
    modular=True,
    reads=("module", "meta", "teacher", "model", "distill"),
    differentiates=("model", "meta"),
    sources=(
        WeightSource("meta"),
        WeightSource("teacher", used=lambda c: c.distill.active and not c.sources.teachers),
        WeightSource(
            "teachers", used=lambda c: c.distill.active and bool(c.sources.teachers), made=False
        ),
    ),
    fit=_fit,
    folder="students",
    makes="students",
    files=(
        FileKind(
            "{family}_student", "a {network} student module, or a folder with all", single=True
        ),
    ),
)
