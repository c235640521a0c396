"""Hybrid networks, meta models with a module inside, for modular training and distillation.

With M the meta model and k the stage of a module, teacher and student share the output of stages
0..k-1 of M, and each continues through stages k+1.. of M, including the norm and head. Only stages
have to match, not blocks, so a meta stage may have any depth.

Axes: B examples, I image rows, J image columns, L labels.

One program can train several modules: M is frozen and the modules share no parameters, so the sum
of their losses has, for each module's parameters, the gradient of that module's own loss.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

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
        check_stages(vars(self))


def check_stages(networks: Mapping[str, Network]) -> None:
    """Raises ValueError unless all networks (keyed by any names) have the same number of stages."""
    # Stages must correspond, blocks need not: the original counts both, and fails where they
    # differ.
    counts = {name: len(network) for name, network in networks.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            "config.meta, config.teacher and config.model must have the same number of depths, not "
            f"{counts}"
        )


def replace_stage(meta: Network, stage: int, module: Network) -> Network:
    """`meta` with stage `stage` taken from `module`: M[:k] . module . M[k+1:] (m2mKD, hybrid
    network).

    Raises:
      ValueError: if the two do not have the same number of stages.
    """
    if len(meta) != len(module):
        raise ValueError(
            f"the meta model has {len(meta)} stages, but the module's network has {len(module)}"
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
    """The input of each module, computed by the stages before it; equal stages run once.

    Args:
      networks: each module's hybrid network, by the module's stage.
      meta_params: parameters of the stages before the last of these modules.
      images: images, channels last.
      train, rngs: training mode and random keys of these stages.

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
    # M is frozen, so gradients into these stages would be wasted work.
    return {
        own: jax.lax.stop_gradient(outputs[network.stages[:own]])
        for own, network in networks.items()
    }


class Module(NamedTuple):
    """A module to run: its stage, its hybrid network, and parameters that include its own."""

    stage: int
    network: Network
    params: Params


def module_logits(
    networks: Mapping[int, Network],
    meta_params: Params,
    params: Params,
    hidden: Mapping[int, Float[Array, "B ..."]],
    *,
    train: bool = False,
    train_meta: bool = False,
    rngs: Keys | None = None,
) -> tuple[dict[int, Float[Array, "B L"]], dict[str, Any]]:
    """The logits of one module per stage, each in its hybrid network; see `hybrid_logits`.

    Args:
      networks: each module's hybrid network, by the module's stage.
      meta_params: parameters of the stages after the first of these modules.
      params: parameters of the modules, one subtree per stage.
      hidden: input of each module by stage, see `shared_tokens`.
      train, train_meta, rngs: see `hybrid_logits`.

    Returns:
      Logits by stage, and the modules' records.
    """
    modules = {stage: Module(stage, network, params) for stage, network in networks.items()}
    logits, recorded = hybrid_logits(
        modules, meta_params, hidden, train=train, train_meta=train_meta, rngs=rngs
    )
    return logits, {name: part for records in recorded.values() for name, part in records.items()}


def hybrid_logits(
    modules: Mapping[Hashable, Module],
    meta_params: Params,
    hidden: Mapping[int, Float[Array, "B ..."]],
    *,
    train: bool = False,
    train_meta: bool = False,
    rngs: Keys | None = None,
) -> tuple[dict[Any, Float[Array, "B L"]], dict[Any, Any]]:
    """The logits of hybrid networks, run from their modules on; several modules may share a stage.

    The tokens of all modules that enter the same meta stage go through it together, with the random
    numbers that each would draw on its own.

    Args:
      modules: the modules, by any key.
      meta_params: parameters of the stages after the first of these modules.
      hidden: input of each module by stage, see `shared_tokens`.
      train: whether the modules are in training.
      train_meta: whether the stages after them are.
      rngs: for both, one key per stream.

    Returns:
      Logits and the modules' records, both by key.
    """
    # One pass over the stages of M. At each stage, the tokens of earlier modules go through it
    # together, and the modules of that stage start. At the end `tokens` holds everyone's logits.
    tokens, recorded = {}, {}
    for stage in range(len(next(iter(modules.values())).network)):
        # Grouped by shape as well: a NAC's read-in student outputs fewer tokens than the others.
        alike = {}
        for key in tokens:
            later = modules[key].network.stages[stage]
            alike.setdefault((later, tokens[key].shape), []).append(key)
        span = {"start": stage, "stop": stage + 1, "rngs": rngs}
        for group in alike.values():
            apply = modules[group[0]].network.apply

            def run_stage(x, apply=apply, span=span):
                return apply(meta_params, x, train=train_meta, **span)[0]

            # vmap rather than one larger batch: random draws depend on the batch shape, and each
            # module must get the draws of a run of its own. M's weights are still read only once.
            together = jax.vmap(run_stage)(jnp.stack([tokens[key] for key in group]))
            # (modules, B, T, D), or (modules, B, L) after the last stage.
            tokens |= dict(zip(group, together, strict=True))
        for key, module in modules.items():
            if module.stage == stage:
                # After the meta stages, so that a module's tokens skip the one that it replaces.
                tokens[key], recorded[key] = module.network.apply(
                    module.params, hidden[stage], train=train, **span
                )
    return tokens, recorded


def teacher_and_student_logits(
    meta: Network,
    teachers: Mapping[str, Network],
    student: Network,
    params: Mapping[str, Params],
    images: Float[Array, "B I J _"],
    *,
    taught_by: Mapping[int, Sequence[str]],
    train: bool,
    rngs: Keys | None = None,
) -> tuple[
    dict[int, tuple[Float[Array, "B L"], ...]], dict[int, Float[Array, "B L"]], dict[str, Any]
]:
    """Runs students and the modules that teach them on the same images (m2mKD, composition).

    Args:
      meta: the meta model.
      teachers: the teachers by name.
      student: the student modules, one per stage.
      params: parameters of the meta model under "meta", of the students under "student", and of
        each teacher under its name.
      images: images, channels last.
      taught_by: the names of the teachers of each student module, by its stage; () for none.
      train, rngs: apply to the students only; meta model and teachers run in evaluation mode.

    Returns:
      By stage, the logits of each teacher in the order of `taught_by`, and the logits of the
      student; and the students' records. Gradients pass through the meta model after a student, but
      not through the shared input or a teacher.
    """
    meta_params = params["meta"]
    students = {stage: replace_stage(meta, stage, student) for stage in taught_by}
    # Before a module, all hybrids of its stage consist of the same stages of M: they share inputs.
    hidden = shared_tokens(students, meta_params, images)
    modules = {
        (stage, name): Module(stage, replace_stage(meta, stage, teachers[name]), params[name])
        for stage, names in taught_by.items()
        for name in names
    }
    given = hybrid_logits(modules, meta_params, hidden)[0] if modules else {}
    targets = {
        stage: tuple(given[stage, name] for name in names) for stage, names in taught_by.items()
    }
    logits, recorded = module_logits(
        students, meta_params, params["student"], hidden, train=train, rngs=rngs
    )
    return jax.lax.stop_gradient(targets), logits, recorded


def pair_logits(
    networks: Pair,
    params: Mapping[str, Params],
    images: Float[Array, "B I J _"],
    *,
    stages: Sequence[int],
    train: bool,
    rngs: Keys | None = None,
) -> tuple[dict[int, Float[Array, "B L"]], dict[int, Float[Array, "B L"]], dict[str, Any]]:
    """`teacher_and_student_logits` with a single teacher, named "teacher".

    Args:
      networks: meta model, teacher and students.
      params: their parameters under "meta", "teacher" and "student".
      images: images, channels last.
      stages: stages of the pairs to run.
      train, rngs: apply to the students only.

    Returns:
      Logits of teachers and students by stage, and the students' records. Gradients pass through
      the meta model after a student, but not through the shared input or a teacher.
    """
    teachers = {"teacher": networks.teacher}
    targets, logits, recorded = teacher_and_student_logits(
        networks.meta,
        teachers,
        networks.student,
        params,
        images,
        taught_by=dict.fromkeys(stages, tuple(teachers)),
        train=train,
        rngs=rngs,
    )
    return {stage: own[0] for stage, own in targets.items()}, logits, recorded
