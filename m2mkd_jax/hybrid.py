"""Hybrid networks, meta models with a module inside, for modular training and distillation.

With M the meta model and k the stage of a module, both sides of a pair share the output of stages
0..k-1 of M, and continue with stages k+1.. of M, norm and head included. Stages are counted, not
blocks, so a meta stage may have any depth.

Axes: B examples, I image rows, J image columns, L labels.

One program can train several modules: M is frozen and the modules share no parameters, so the
gradient of the sum of their losses by each module's parameters is that of its own loss.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from m2mkd_jax.stages import Network, Params

Keys = Mapping[str, PRNGKeyArray]


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


def shared_tokens(
    networks: Mapping[int, Network],
    meta_params: Params,
    images: Float[Array, "B I J _"],
    *,
    train: bool = False,
    rngs: Keys | None = None,
) -> dict[int, Float[Array, "B ..."]]:
    """The input of each module from the stages before it; equal stages run once.

    Args:
      networks: each module's hybrid network, by the module's stage.
      meta_params: of the stages before the last of these modules.
      images: with channels last.
      train, rngs: of these stages.

    Returns:
      By stage: images for the first, tokens (B, T, D) for the others, without gradient.
    """
    # Keyed by the stages themselves, not by their numbers: stochastic depth ramps over each hybrid,
    # so two hybrids may differ in a stage of M, and only equal ones can share.
    outputs = {(): images}
    for own, network in networks.items():
        for stage in range(own):
            stages = network.stages[: stage + 1]
            if stages not in outputs:
                x, span = outputs[stages[:-1]], {"start": stage, "stop": stage + 1}
                outputs[stages], _ = network.apply(meta_params, x, train=train, rngs=rngs, **span)
    # M is frozen, so gradients into these stages would be computed in vain.
    return {
        own: jax.lax.stop_gradient(outputs[network.stages[:own]])
        for own, network in networks.items()
    }


def finish(
    networks: Mapping[int, Network],
    meta_params: Params,
    params: Params,
    hidden: Mapping[int, Float[Array, "B ..."]],
    *,
    train: bool = False,
    train_meta: bool = False,
    rngs: Keys | None = None,
) -> tuple[dict[int, Float[Array, "B L"]], dict[str, Any]]:
    """Runs hybrid networks from their modules to the logits.

    Tokens of all modules that enter the same meta stage go through it together, with the random
    numbers that each would draw alone.

    Args:
      networks: each module's hybrid network, by the module's stage.
      meta_params: of the stages after the first of these modules.
      params: of the modules, one subtree per stage.
      hidden: input of each module by stage, see `shared_tokens`.
      train: whether the modules are in training.
      train_meta: whether the stages after them are.
      rngs: for both, one key per stream.

    Returns:
      Logits by stage, and the modules' records.
    """
    # One pass over the stages of M: the tokens of earlier modules go through a stage together, and
    # the module of that stage starts. At the end `tokens` has the logits of all.
    tokens, recorded = {}, {}
    for stage in range(len(next(iter(networks.values())))):
        # Together if stage and shape are equal: a NAC's read-in student outputs fewer tokens.
        alike = {}
        for own in tokens:
            alike.setdefault((networks[own].stages[stage], tokens[own].shape), []).append(own)
        span = {"start": stage, "stop": stage + 1, "rngs": rngs}
        for group in alike.values():
            apply = networks[group[0]].apply

            def run_stage(x, apply=apply, span=span):
                return apply(meta_params, x, train=train_meta, **span)[0]

            # vmap instead of a larger batch: random draws depend on the batch shape, and must be
            # those of a run of each module alone. The weights of M are read once.
            together = jax.vmap(run_stage)(jnp.stack([tokens[own] for own in group]))
            tokens |= dict(zip(group, together, strict=True))
        if stage in networks:
            # Last, so that a module's tokens do not go through the meta stage that it replaces.
            tokens[stage], records = networks[stage].apply(
                params, hidden[stage], train=train, **span
            )
            recorded |= records
    return tokens, recorded


def pair_logits(
    networks: Pair,
    params: Mapping[str, Params],
    images: Float[Array, "B I J _"],
    *,
    stages: Sequence[int],
    train: bool,
    rngs: Keys | None = None,
) -> tuple[dict[int, Float[Array, "B L"]], dict[int, Float[Array, "B L"]], dict[str, Any]]:
    """Both sides of module pairs on the same images (m2mKD, composition).

    Args:
      networks: meta model, teacher and students.
      params: their parameters under "meta", "teacher" and "student".
      images: with channels last.
      stages: of the pairs.
      train, rngs: for the students alone.

    Returns:
      Logits of teachers and students by stage, and the students' records. Gradients pass through
      the meta model after a student, but not through the shared input or a teacher.
    """
    meta = params["meta"]
    teachers, students = (
        {stage: replace_stage(networks.meta, stage, network) for stage in stages}
        for network in (networks.teacher, networks.student)
    )
    # Both hybrids have the same stages of M before their modules, so they share their input.
    hidden = shared_tokens(students, meta, images)
    targets, _ = finish(teachers, meta, params["teacher"], hidden)
    logits, recorded = finish(students, meta, params["student"], hidden, train=train, rngs=rngs)
    return jax.lax.stop_gradient(targets), logits, recorded
