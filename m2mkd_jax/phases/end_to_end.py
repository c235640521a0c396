"""Phase end_to_end: the whole student network, from distilled students (FT) or from scratch
(E2E)."""

import functools
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Origin
from m2mkd_jax.config import Config
from m2mkd_jax.models import vit
from m2mkd_jax.models.nac.model import NacConfig
from m2mkd_jax.phases.circuit import circuit_regularizer, draw_circuit, start_circuit
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
from m2mkd_jax.phases.training import config_feed, train_phase
from m2mkd_jax.stages import Network, stage_name


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the whole student network; its parameters are saved under "student".

    It starts from the students of config.sources.students, from the dense ViT of
    config.init.upcycle, or from scratch where there is neither; config.baseline adds distillation
    from the logits of the whole teacher. A NAC's mediators start from config.model.prior, and
    config.regularizers act on its signatures.
    """
    kind = family(config)
    network = whole_student(config, drop_path=config.drop_path)
    warm_start = None
    if config.sources.students:
        sources = require_stage_sources(config, "students", len(network))
        origins = [
            Origin(source, f"student/{stage_name(i)}", f"student/{stage_name(i)}")
            for i, source in enumerate(sources)
        ]
        left, fresh = kind.left(config), kind.fresh(config)
        warm_start = lambda wanted: take_weights(  # noqa: E731
            config, wanted, origins, leave=left, fresh=fresh
        )
    elif config.init.upcycle:
        warm_start = functools.partial(upcycle, config)

    forward, helpers = whole_forward(network, "student"), {}
    if config.baseline.kind != "none":
        teacher = teacher_network(config)
        origin = Origin(require_source(config, "teacher"), "teacher", "teacher")
        needed = wanted(teacher, "teacher", mesh, vit.PARTITION_RULES)
        helpers = take_weights(config, needed, [origin]).params
        forward = _taught(forward, teacher)

    feed = config_feed(config, workdir)
    init, trainable, regularizer, circuit = network.init, ".*", None, None
    if isinstance(config.model, NacConfig):
        circuit = start_circuit(config, workdir)
        init = functools.partial(network.init, signatures=circuit.signatures)
        trainable = config.model.trainable()
        regularizer = circuit_regularizer(config, circuit, steps_per_epoch=feed.steps_per_epoch)
    result = train_phase(
        config,
        workdir,
        mesh,
        title=config.phase,
        init=lambda key: {"student": init(key)},
        rules=kind.rules,
        forward=forward,
        trainable=trainable,
        helpers=helpers,
        warm_start=warm_start,
        distill=config.baseline,
        regularizer=regularizer,
        feed=feed,
    )
    if circuit is not None:
        draw_circuit(config, circuit, workdir)
    return result


def _taught(student: Forward, teacher: Network) -> Forward:
    """The student's forward pass with the logits of the whole teacher on the same images."""

    def forward(params, helpers, images, train, rngs):
        logits, _ = teacher.apply(helpers["teacher"], images)
        outputs = student(params, helpers, images, train, rngs)
        return outputs._replace(teacher=jax.lax.stop_gradient(logits))

    return forward
