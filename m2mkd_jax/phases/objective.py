"""The loss and the evaluation that all phases share; a phase defines the forward pass."""

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


class Outputs(NamedTuple):
    """Outputs of a network: logits (B, L), its teacher's logits if there is a teacher, (N, B, L) if
    there are N of them, and the records of its trained stages."""

    logits: jax.Array
    teacher: jax.Array | None
    recorded: Mapping[str, Any]


# forward(params, helpers, images, train, rngs) -> outputs by name of the networks trained together:
# one, or several whose parameters are disjoint. In evaluation rngs has only EVALUATION_STREAMS, or
# is None if nothing is drawn.
Forward = Callable[
    [Any, Any, jax.Array, bool, Mapping[str, jax.Array] | None], Mapping[str, Outputs]
]

EVALUATION_STREAMS = ("state", "pooling", "kernel")


def whole_forward(network: WholeNetwork, role: str) -> Forward:
    """The forward pass of a whole network, whose parameters are under `role`, without a teacher."""

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
    """Label loss, blended with the distillation that `distill` names, plus the experts' balance
    losses and the regularizer's term; summed over the networks if there are several.

    Its metrics are `label_loss`, `distillation`, those of the regularizer and, for every MoE layer,
    `moe/STAGE/BLOCK/` `load`, `dropped` and `entropy`. With several networks `label_loss` and
    `distillation` are means, besides `NAME/label_loss` and `NAME/distillation` of each.
    """

    def loss(params, helpers, batch, rngs, step):
        images, targets = prepare_training(batch, rngs, config.data, config.augment)
        total, parts, moe = jnp.zeros(()), {}, {}
        for name, outputs in forward(params, helpers, images, True, rngs).items():
            value = losses.soft_cross_entropy(outputs.logits, targets)
            parts[name] = {"label_loss": value}
            if distill.active:
                distillation = losses.DISTILLATIONS[distill.kind]
                if outputs.teacher.ndim == 3:
                    combine = losses.COMBINATIONS[distill.combine]
                    distillation = functools.partial(combine, distillation)
                term = distillation(outputs.logits, outputs.teacher, distill.tau)
                value = losses.blend(value, term, distill.alpha)
                parts[name]["distillation"] = term
            recorded, balance = _moe_metrics(outputs.recorded)
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
      forward: from parameters and images to logits.
      config: its evaluation section says whether anything is drawn.
      evaluators: keys of `EVALUATORS`.
      classes: the classes of the network that the batch's labels index; None if labels are the
        network's own.
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
    """The streams of random numbers of one evaluation batch; None where nothing is drawn."""
    if config.evaluation.noise == "mean":
        return None
    return {name: fold_name(key, name) for name in EVALUATION_STREAMS}


def _with_means(parts: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """The metrics of one network; for several, their means and each as `NAME/METRIC`."""
    means = jax.tree.map(lambda *values: sum(values) / len(values), *parts.values())
    if len(parts) == 1:
        return means
    return means | traverse_util.flatten_dict(parts, sep="/")


def _moe_metrics(recorded: Mapping[str, Any]) -> tuple[dict[str, jax.Array], jax.Array]:
    """One metric per layer and quantity, and the sum of the balance losses."""
    metrics, balance = {}, jnp.zeros(())
    for path, value in traverse_util.flatten_dict(recorded).items():
        stage, collection, block, _, name = path
        assert collection == "moe", path
        if name == "balance_loss":
            balance += value
        else:
            metrics[f"moe/{stage}/{block}/{name}"] = value
    return metrics, balance
