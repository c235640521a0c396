"""The record of an evaluator, and several of them as one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from common_jax.step import Evaluate


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """An evaluation of a validation set.

    Attributes:
      make: (the set, as the runs of a stage give it) -> evaluate(params, helpers, step), whose
        result is metrics by name. Sets are `translation.SentenceSet` and `retrieval.PairSet`.
      best: metrics whose highest value is the best, by which config.run.best may choose.
      searches: whether it translates, which config.valid_decode=False leaves out.
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
