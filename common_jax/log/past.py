"""What earlier starts of a run have logged, which a resumed run depends on."""

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from common_jax import hosts
from common_jax.metrics import read_metrics, scalar
from common_jax.run_config import Due


@dataclasses.dataclass(frozen=True)
class Past:
    """The log up to the step that a run resumes at.

    Attributes:
      last: the last line; None without one.
      averaged: whether the line of the step itself, with averages since the line before, is there.
      evaluations: lines with the metrics of an evaluation, by step.
    """

    last: Mapping[str, Any] | None
    averaged: bool
    evaluations: Mapping[int, Mapping[str, Any]]


def read_past(
    record: epath.Path, *, step: int, evaluators: Collection[str], best: str | None
) -> Past:
    """Reads metrics.jsonl; all processes must call this together.

    Args:
      record: the file, from which lines beyond `step` have been dropped; it may be missing.
      step: updates done before this start.
      evaluators: prefixes of the metrics of evaluations, such as "test".
      best: the metric that selects the best checkpoint, or None.

    Raises:
      ValueError: as `common_jax.metrics.read_metrics`, or if a value of `best` is not a number.
    """

    def read() -> dict[str, Any]:
        lines = read_metrics(record) if record.exists() else []
        prefixes = tuple(f"{name}/" for name in evaluators)
        found = [line for line in lines if any(name.startswith(prefixes) for name in line)]
        for line in found if best is not None else ():
            scalar(record, line, best)
        averaged = any(line["step"] == step and "train/loss" in line for line in lines)
        return {"lines": lines[-1:], "averaged": averaged, "evaluations": found}

    values = hosts.decide(read)
    evaluations = {line["step"]: line for line in values["evaluations"]}
    return Past(next(iter(values["lines"]), None), values["averaged"], evaluations)


def unscored(record: epath.Path, due: Due, steps: Collection[int]) -> list[int]:
    """Those of the checkpoints `steps`, which have no evaluation in the log, that must have had
    one; with a warning."""
    found = [step for step in sorted(steps) if due.checkpoint(step) and due.evaluation(step)]
    if found:
        logging.warning(
            "%s lacks the evaluations of steps %s: lines of the log are lost. The checkpoints of "
            "these steps are kept, since one of them may be the best",
            record,
            found,
        )
    return found
