"""Phase end_to_end: the whole student network, from distilled students (FT) or from scratch
(E2E)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax import numpy as jnp
from jax.sharding import Mesh

from common_jax import checkpoint
from common_jax.weights import Origin, Planned, WarmStart
from common_jax.workdir import refuse_other_config
from m2mkd_jax.config import Config
from m2mkd_jax.families import family_of
from m2mkd_jax.phases.networks import whole_student
from m2mkd_jax.phases.objective import Forward
from m2mkd_jax.phases.phase import FileKind, Phase, Splits, Training, WeightSource, config_feed
from m2mkd_jax.phases.sources.teachers import (
    ACCOUNT,
    Teachers,
    check_classes,
    load_teachers,
    teacher_names,
    whole_teachers,
)
from m2mkd_jax.phases.sources.weights import require_source, require_stage_sources, take_weights
from m2mkd_jax.phases.training import check_training, train_phase, whole_training
from m2mkd_jax.stages import stage_name


def run(
    config: Config, workdir: epath.Path, mesh: Mesh, splits: Splits | None = None
) -> dict[str, Any]:
    """Trains the whole student and saves its parameters under "student".

    It starts from the distilled students in config.sources.students, from the dense ViT in
    config.init.upcycle, or from scratch if both are empty.
    """
    # First, since it refuses a wrong number of workdirs before data or weights are read.
    warm_start, helpers, files = _warm_start(config), {}, {}
    training, start = describe(config, mesh), None
    feed = config_feed(training, workdir, splits)
    if config.baseline.active and config.sources.teachers:
        check_classes(config, feed.label_names, ("teachers",))
        helpers, files[ACCOUNT] = load_teachers(config, training.helpers)
    elif config.baseline.active:
        check_classes(config, feed.label_names, ("teacher",))
        helpers = _take_teacher(training).params
    preparation = family_of(config.model).preparation
    if preparation is not None:
        check_training(training, feed, mesh)  # before `make` writes anything
        refuse_other_config(workdir, config)
        start = preparation.make(config.model, config.seed, workdir)
        # Again, with the real values in place of the sketch that was checked.
        training = describe(config, mesh, start=start)
    result = train_phase(
        training, workdir, mesh, helpers=helpers, warm_start=warm_start, feed=feed, files=files
    )
    if preparation is not None:
        preparation.draw(config.model, start, workdir)
    return result


def describe(config: Config, mesh: Mesh, *, start: Any = None) -> Training:
    """The whole student; config.baseline adds distillation from the logits of whole teachers.

    A family with a preparation starts from `start`, the prepared initial values. By default this is
    a sketch with other numbers, which compiles to the same program.
    """
    training = whole_training(PHASE, config)
    if config.baseline.active:
        teachers = whole_teachers(config)
        training = dataclasses.replace(
            training,
            forward=_with_teachers(training.forward, teachers, teacher_names(config)),
            helpers=teachers.shapes(mesh),
            distill=config.baseline,
        )
    if family_of(config.model).preparation is not None:
        training = _with_preparation(training, start)
    return training


def upcycle(config: Config, shapes: Mapping[str, Any]) -> WarmStart:
    """Initialises the student from the dense ViT in config.init.upcycle."""
    source = config.init.upcycle
    start = family_of(config.model).upcycle(config.model, source, shapes["student"])
    return take_weights(config, shapes, [start.origin], fresh=start.fresh, adapt=start.adapt)


def _warm_start(config: Config) -> Callable[[Any], WarmStart] | None:
    if config.sources.students:
        _student_sources(config)
        return lambda shapes: _assemble(config, shapes)
    return (lambda shapes: upcycle(config, shapes)) if config.init.upcycle else None


def _take_teacher(training: Training, *, planned: Planned | None = None) -> WarmStart:
    """Loads the whole teacher; with `planned`, only checks that it fits."""
    config = training.config
    origin = Origin(require_source(config, "teacher"), "teacher", "teacher")
    return take_weights(config, training.helpers, [origin], frozen=True, planned=planned)


def _fit(training: Training, planned: Planned) -> None:
    config = training.config
    if config.baseline.active and not config.sources.teachers:
        _take_teacher(training, planned=planned)
    if config.sources.students:
        _assemble(config, training.shapes, planned=planned)


def _student_sources(config: Config) -> tuple[str, ...]:
    """The workdir of each stage; raises ValueError for a wrong number of workdirs."""
    return require_stage_sources(config, "students", len(whole_student(config)))


def _assemble(
    config: Config,
    shapes: Mapping[str, Any],
    *,
    planned: Planned | None = None,
) -> WarmStart:
    """Loads each stage from its source, a run of students or of whole networks; with `planned`,
    only checks that all fit."""
    sources, family = _student_sources(config), family_of(config.model)
    names = [stage_name(i) for i in range(len(sources))]
    pairs = [*zip(sources, names, strict=True)]
    left, fresh = family.left(config.model), family.fresh(config.model)
    # Only whole networks have what belongs to no stage, such as a NAC's latents.
    rest = sorted(shapes["student"].keys() - set(names))
    made = [_names_in(source, planned or {}) for source in dict.fromkeys(sources)]
    if rest and all(names.issuperset(rest) for names in made):
        pairs += [(sources[0], name) for name in rest]
        left = fresh = ()
    origins = [Origin(source, f"student/{name}", f"student/{name}") for source, name in pairs]
    return take_weights(config, shapes, origins, leave=left, fresh=fresh, planned=planned)


def _names_in(source: str, planned: Planned) -> set[str]:
    """The names at the top of a run's student."""
    shapes = planned[source] if source in planned else checkpoint.load_shapes(source)
    return {*shapes.get("student", {})}


def _with_preparation(training: Training, start: Any) -> Training:
    """Adds the family's initial values, trainable parameters and regularizer."""
    config = training.config
    model, preparation = config.model, family_of(config.model).preparation
    if start is None:
        preparation.check(model, config.seed)
        start = preparation.sketch(model, config.seed)
    init = preparation.init(whole_student(config, drop_path=config.drop_path), start)

    def regularizer(steps_per_epoch: int):
        settings = config.regularizers, config.optim, steps_per_epoch
        return preparation.regularizer(model, start, *settings)

    return dataclasses.replace(
        training,
        init=lambda key: {"student": init(key)},
        trainable=preparation.trainable(model),
        regularizer=regularizer,
    )


def _with_teachers(student: Forward, teachers: Teachers, names: tuple[str, ...]) -> Forward:
    """Adds the whole teachers' logits on the same images to the student's outputs."""

    def forward(params, helpers, images, train, rngs):
        given = {
            # Without `train` and keys: teachers are in evaluation mode whatever the student is in.
            name: jax.lax.stop_gradient(network.apply(helpers[name], images)[0])
            for name, network in teachers.networks.items()
        }
        # A teacher that is named twice runs once, but counts twice.
        logits = [given[name] for name in names]
        taught = {"teacher": jnp.stack(logits) if len(logits) > 1 else logits[0]}
        outputs = student(params, helpers, images, train, rngs)
        return {name: part._replace(**taught) for name, part in outputs.items()}

    return forward


PHASE = Phase(
    describe=describe,
    run=run,
    role="student",
    # A student's stitches are as wide as the meta model.
    reads=("meta.width", "teacher", "model", "regularizers", "baseline"),
    differentiates=("model",),
    sources=(
        WeightSource("students"),
        WeightSource(
            "teacher", used=lambda config: config.baseline.active and not config.sources.teachers
        ),
        WeightSource(
            "teachers",
            used=lambda config: config.baseline.active and bool(config.sources.teachers),
            made=False,
        ),
        WeightSource("upcycle", section="init"),
    ),
    ood=True,
    fit=_fit,
    folder="end_to_end",
    makes="network",
    files=(FileKind("{family}", "a whole {network}"),),
)
