"""The loss and the evaluation that all phases share; each phase defines its forward pass."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from jax import numpy as jnp

from common_jax.state import fold_name
from common_jax.step import Loss, Sums
from m2mkd_jax import losses
from m2mkd_jax.config import Config, DistillConfig
from m2mkd_jax.data.feed import prepare_evaluation, prepare_training
from m2mkd_jax.evaluators import EVALUATORS
from m2mkd_jax.evaluators.classification import restrict_logits
from m2mkd_jax.families.family import Regularizer, WholeNetwork
from m2mkd_jax.phases.networks import network_streams


class Outputs(NamedTuple):
    """Outputs of a network: logits (B, L); its teacher's logits (B, L), or (N, B, L) for N
    teachers, or None; and the records of its trained stages."""

    logits: jax.Array
    teacher: jax.Array | None
    recorded: Mapping[str, Any]


# forward(params, helpers, images, train, rngs) -> outputs by network name. Several networks that
# train together have disjoint parameters. In evaluation rngs has only the families'
# `evaluation_streams`, or is None if nothing is drawn.
Forward = Callable[
    [Any, Any, jax.Array, bool, Mapping[str, jax.Array] | None], Mapping[str, Outputs]
]


def whole_forward(network: WholeNetwork, role: str) -> Forward:
    """The forward pass of a whole network without a teacher; its parameters are under `role`."""

    def forward(params, helpers, images, train, rngs):
        logits, recorded = network.apply(params[role], images, train=train, rngs=rngs)
        return {role: Outputs(logits, None, recorded)}

    return forward


def make_loss(
    forward: Forward,
    config: Config,
    distill: DistillConfig,
    *,
    regularizer: Regularizer | None = None,
) -> Loss:
    """Label loss, blended with the distillation that `distill` names, plus the balance losses of
    the experts and the regularizer's term. With several networks the loss is their sum.

    Its metrics are `label_loss`, `distillation`, those of the regularizer and, for every MoE layer,
    those of its router as `moe/STAGE/BLOCK/NAME`, such as `load`, `dropped` and `entropy`. With
    several networks `label_loss` and `distillation` are means over the networks, and
    `NAME/label_loss` and `NAME/distillation` give each one's own.
    """

    def loss(params, helpers, batch, rngs, step):
        images, targets = prepare_training(batch, rngs, config.data, config.augment)
        total, parts, moe = jnp.zeros(()), {}, {}
        for name, outputs in forward(params, helpers, images, True, rngs).items():
            # Without mixing too: smoothed one-hot targets give the cross entropy with label
            # smoothing.
            value = losses.soft_cross_entropy(outputs.logits, targets)
            parts[name] = {"label_loss": value}
            # Without a distillation the label loss keeps its full weight, not 1 - alpha.
            if distill.active:
                distillation = losses.DISTILLATIONS[distill.kind].loss
                # (N, B, L): only a run with `sources.teachers` has the first axis.
                if outputs.teacher.ndim == 3:
                    combine = losses.COMBINATIONS[distill.combine]
                    distillation = functools.partial(combine, distillation)
                term = distillation(outputs.logits, outputs.teacher, distill.tau)
                value = losses.blend(value, term, distill.alpha)
                parts[name]["distillation"] = term
            recorded, balance = _moe_metrics(outputs.recorded)
            # Summed, not averaged: modules share no parameters, so the gradient of each is that of
            # its own loss, as if it were trained alone.
            total, moe = total + value + balance, moe | recorded
        metrics = _with_means(parts) | moe
        if regularizer is not None:
            term, terms = regularizer(params, step)
            total, metrics = total + term, metrics | terms
        return total, metrics

    return loss


def make_sums(
    forward: Forward,
    config: Config,
    evaluators: Sequence[str],
    *,
    classes: tuple[int, ...] | None = None,
) -> Sums:
    """Totals of one evaluation batch for `common_jax.step.make_evaluator`.

    Args:
      forward: maps parameters and images to logits.
      config: the config, whose evaluation section says whether random numbers are drawn.
      evaluators: keys of `EVALUATORS`.
      classes: if the test set has only some of the classes, label i of a batch means the network's
        class `classes[i]`; None if labels are the network's own.
    """

    def sums(params, helpers, batch, key):
        images = prepare_evaluation(batch, config.data)
        rngs, parts = evaluation_rngs(config, key), {}
        for name, outputs in forward(params, helpers, images, False, rngs).items():
            logits = outputs.logits
            if classes is not None:
                logits = restrict_logits(logits, classes)
            parts[name] = {}
            for evaluator in evaluators:
                totals = EVALUATORS[evaluator].totals
                parts[name] |= totals(logits, batch["label"], batch["_mask"])
        return _with_means(parts) | {"count": jnp.sum(batch["_mask"])}

    return sums


def evaluation_rngs(config: Config, key: jax.Array) -> Mapping[str, jax.Array] | None:
    """The random streams of one evaluation batch; None if nothing is drawn."""
    if config.evaluation.noise == "mean":
        return None
    return {name: fold_name(key, name) for name in network_streams(config, train=False)}


def _with_means(parts: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """The metrics of a single network; for several networks, the means as well as each network's
    own, as `NAME/METRIC`."""
    means = jax.tree.map(lambda *values: sum(values) / len(values), *parts.values())
    if len(parts) == 1:
        return means
    return means | traverse_util.flatten_dict(parts, sep="/")


def _moe_metrics(recorded: Mapping[str, Any]) -> tuple[dict[str, jax.Array], jax.Array]:
    """One metric per layer and quantity, and the sum of the balance losses."""
    metrics, balance = {}, jnp.zeros(())
    # Paths are STAGE/moe/BLOCK/moe/NAME: the linen collection is below the stage that was applied.
    for path, value in traverse_util.flatten_dict(recorded).items():
        stage, collection, block, _, name = path
        assert collection == "moe", path
        if name == "balance_loss":
            balance += value
        else:
            metrics[f"moe/{stage}/{block}/{name}"] = value
    return metrics, balance
