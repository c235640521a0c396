"""Evaluators: metric totals over batches, and how to format their means. One entry of `EVALUATORS`
each."""

import dataclasses
import types
from collections.abc import Callable, Mapping

from jaxtyping import Array, Float, Int

from m2mkd_jax.evaluators.classification import classification_sums

Totals = Callable[
    [Float[Array, "B L"], Int[Array, " B"], Float[Array, " B"]], dict[str, Float[Array, ""]]
]


def percent(share: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * share:.1f} %"


def decimal(value: float) -> str:
    """A number with three decimals."""
    return f"{value:.3f}"


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """An evaluation of logits against labels.

    Attributes:
      totals: (logits, labels, mask) -> sums over the batch's examples, by metric. The sums over all
        batches are divided by the number of examples.
      shown: metric -> function that formats its mean for a table; all that `totals` returns.
      lower: the metrics of which lower is better, for the best checkpoint.
    """

    totals: Totals
    shown: Mapping[str, Callable[[float], str]]
    lower: tuple[str, ...]


EVALUATORS: Mapping[str, Evaluator] = types.MappingProxyType(
    {
        # Totals, because the last batch is padded: a mean of means would weigh its examples more.
        # The original leaves that batch out.
        "classification": Evaluator(
            classification_sums,
            shown={"accuracy": percent, "accuracy_top5": percent, "loss": decimal},
            lower=("loss",),
        ),
    }
)


def show(metric: str, mean: float | None) -> str:
    """The mean of an evaluator's metric, formatted for a table; "none" for None. Raises ValueError
    for a metric that no evaluator lists."""
    formats = {name: write for one in EVALUATORS.values() for name, write in one.shown.items()}
    if metric not in formats:
        raise ValueError(
            f"no evaluator of {list(EVALUATORS)} lists the metric {metric!r} in `shown`, which "
            f"must have all that its `totals` returns; listed are {list(formats)}"
        )
    return "none" if mean is None else formats[metric](mean)
