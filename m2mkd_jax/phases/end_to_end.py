"""Phase end_to_end: the whole student network, from distilled students (FT) or from scratch
(E2E)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Origin, WarmStart
from m2mkd_jax.config import Config
from m2mkd_jax.models import vit
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.phases.circuit import (
    Circuit,
    circuit_regularizer,
    draw_circuit,
    draw_signatures,
    start_circuit,
)
from m2mkd_jax.phases.families import family, whole_student
from m2mkd_jax.phases.networks import (
    require_source,
    require_stage_sources,
    take_weights,
    teacher_network,
    upcycle,
    wanted,
)
from m2mkd_jax.phases.objective import Forward, whole_forward
from m2mkd_jax.phases.training import Training, check_training, config_feed, train_phase
from m2mkd_jax.stages import Network, stage_name


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the whole student network; its parameters are saved under "student".

    It starts from the students of config.sources.students, from the dense ViT of
    config.init.upcycle, or from scratch where there is neither.
    """
    warm_start, helpers = _warm_start(config), {}
    if config.baseline.kind != "none":
        origin = Origin(require_source(config, "teacher"), "teacher", "teacher")
        helpers = take_weights(config, _teacher_shapes(config, mesh), [origin], frozen=True).params
    feed = config_feed(config, workdir)
    circuit = None
    if isinstance(config.model, NacConfig):
        check_training(describe(config, mesh), feed, mesh)  # before the prior is written
        circuit = start_circuit(config, workdir)
    training = describe(config, mesh, circuit=circuit)
    result = train_phase(training, workdir, mesh, helpers=helpers, warm_start=warm_start, feed=feed)
    if circuit is not None:
        draw_circuit(config, circuit, workdir)
    return result


def describe(config: Config, mesh: Mesh, *, circuit: Circuit | None = None) -> Training:
    """The whole student; config.baseline adds distillation from the logits of the whole teacher.

    A NAC's latents start as `circuit` says, and config.regularizers act on its signatures; without
    one the mediators' are drawn and fitted to no prior, which changes numbers and no program.
    """
    kind = family(config)
    network = whole_student(config, drop_path=config.drop_path)
    forward, helpers = whole_forward(network, "student"), {}
    if config.baseline.kind != "none":
        forward = _taught(forward, teacher_network(config))
        helpers = _teacher_shapes(config, mesh)
    init, trainable, regularizer = network.init, ".*", None
    if isinstance(config.model, NacConfig):
        circuit = circuit or Circuit(draw_signatures(config), None)
        init = functools.partial(network.init, signatures=circuit.signatures)
        trainable = config.model.trainable()
        regularizer = functools.partial(circuit_regularizer, config, circuit)
    return Training(
        config,
        title=config.phase,
        init=lambda key: {"student": init(key)},
        rules=kind.rules,
        forward=forward,
        trainable=trainable,
        helpers=helpers,
        distill=config.baseline,
        regularizer=regularizer,
    )


def _warm_start(config: Config) -> Callable[[Any], WarmStart] | None:
    if config.sources.students:
        count, kind = len(whole_student(config)), family(config)
        origins = [
            Origin(source, f"student/{stage_name(i)}", f"student/{stage_name(i)}")
            for i, source in enumerate(require_stage_sources(config, "students", count))
        ]
        left, fresh = kind.left(config), kind.fresh(config)
        return lambda wanted: take_weights(config, wanted, origins, leave=left, fresh=fresh)
    return functools.partial(upcycle, config) if config.init.upcycle else None


def _teacher_shapes(config: Config, mesh: Mesh) -> dict[str, Any]:
    return wanted(teacher_network(config), "teacher", mesh, vit.PARTITION_RULES)


def _taught(student: Forward, teacher: Network) -> Forward:
    """The student's forward pass with the logits of the whole teacher on the same images."""

    def forward(params, helpers, images, train, rngs):
        logits, _ = teacher.apply(helpers["teacher"], images)
        outputs = student(params, helpers, images, train, rngs)
        taught = jax.lax.stop_gradient(logits)
        return {name: part._replace(teacher=taught) for name, part in outputs.items()}

    return forward
