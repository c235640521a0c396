"""The table of evaluators, by the names in `Stage.evaluators`."""

import types
from collections.abc import Mapping

from cliptrans_jax.evaluators import labels, retrieval, translation
from cliptrans_jax.evaluators.evaluator import Evaluator
from cliptrans_jax.stages import STAGES

EVALUATORS: Mapping[str, Evaluator] = types.MappingProxyType(
    {
        "labels": labels.EVALUATOR,
        "translations": translation.EVALUATOR,
        "retrieval": retrieval.EVALUATOR,
    }
)


def evaluators_of(*stages: str) -> list[Evaluator]:
    """The evaluators of these stages, each once; runs that are not a stage have none."""
    listed = {
        name: None for stage in stages if stage in STAGES for name in STAGES[stage].evaluators
    }
    return [EVALUATORS[name] for name in listed]
