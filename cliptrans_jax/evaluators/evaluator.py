"""The record of an evaluator, and the combination of several."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from common_jax.step import Evaluate


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A way to evaluate a model on a validation set.

    Attributes:
      make: (set) -> evaluate(params, helpers, step) -> metrics by name, for a
        `translation.SentenceSet` or a `retrieval.PairSet`.
      best: metrics that config.run.best may name; higher is better.
      searches: whether it decodes; if so, config.valid_decode=False disables it.
    """

    make: Callable[[Any], Evaluate]
    best: tuple[str, ...] = ()
    searches: bool = False


def evaluate_all(evaluations: Sequence[Evaluate]) -> Evaluate:
    """evaluate(params, helpers, step) -> the metrics of all evaluations."""

    def evaluate(params: Any, helpers: Any, step: int) -> dict[str, float]:
        return {
            name: value for one in evaluations for name, value in one(params, helpers, step).items()
        }

    return evaluate
