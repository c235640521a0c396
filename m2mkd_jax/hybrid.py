"""Meta models around modules: the networks that modular training and distillation run.

With M the meta model and k the stage of a module, a pair shares what stages 0..k-1 of M make of
the images, and both of its sides are finished by stages k+1.. of M, norm and head included. Stages
are counted, never blocks, so a meta stage may be of any depth.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from m2mkd_jax.stages import Network, Params, stage_name


@dataclasses.dataclass(frozen=True)
class Pair:
    """The networks of a distillation, cut into the same number of stages."""

    meta: Network
    teacher: Network
    student: Network

    def __post_init__(self):
        counts = {name: len(network) for name, network in vars(self).items()}
        if len(set(counts.values())) != 1:
            raise ValueError(
                "config.meta, config.teacher and config.model must have as many depths each, not "
                f"{counts}"
            )


def replace_stage(meta: Network, stage: int, module: Network) -> Network:
    """`meta` with stage `stage` taken from `module`: M[:k] . module . M[k+1:] (m2mKD, hybrid
    network).

    Raises:
      ValueError: when the two do not have the same number of stages.
    """
    if len(meta) != len(module):
        raise ValueError(
            f"the meta model has {len(meta)} stages and the network of the module {len(module)}"
        )
    stages = list(meta.stages)
    stages[stage] = module.stages[stage]
    return Network(tuple(stages))


def finish_with_meta(
    meta: Network,
    meta_params: Params,
    module: Network,
    module_params: Params,
    hidden: jax.Array,
    *,
    stage: int,
    train: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Logits of one side of a pair: stage `stage` of `module` on `hidden`, then the meta model's
    stages behind it.

    Args:
      meta, meta_params: the meta model; only stages behind `stage` are used.
      module, module_params: the network of the module; only stage `stage` is used.
      hidden: images (B, I, J, channels) for the first stage, else tokens (B, T, D) of the meta
        model.
      stage: which.
      train, rngs: for the module; the meta model is never in training here.

    Returns:
      Logits (B, L), and what the module recorded.
    """
    tokens, recorded = module.apply(
        module_params, hidden, start=stage, stop=stage + 1, train=train, rngs=rngs
    )
    logits, _ = meta.apply(meta_params, tokens, start=stage + 1)
    return logits, recorded[stage_name(stage)]


def pair_logits(
    networks: Pair,
    params: Mapping[str, Params],
    images: jax.Array,
    *,
    stage: int,
    train: bool,
    rngs: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Both sides of module pair `stage` on the same images (m2mKD, composition).

    Args:
      networks: meta model, teacher and students.
      params: their parameters under "meta", "teacher" and "student".
      images: (B, I, J, channels).
      stage: which pair.
      train, rngs: for the student alone.

    Returns:
      Logits of teacher and student, each (B, L); and what the student recorded. No gradient passes
      through the shared input or the teacher; the student's passes through the meta model.
    """
    meta = networks.meta
    shared, _ = meta.apply(params["meta"], images, stop=stage)
    shared = jax.lax.stop_gradient(shared)
    teacher, _ = finish_with_meta(
        meta, params["meta"], networks.teacher, params["teacher"], shared, stage=stage
    )
    student, recorded = finish_with_meta(
        meta,
        params["meta"],
        networks.student,
        params["student"],
        shared,
        stage=stage,
        train=train,
        rngs=rngs,
    )
    return jax.lax.stop_gradient(teacher), student, recorded
