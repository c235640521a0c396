"""Finds the runs below a folder, and the curves in their metrics.

A run is a folder with `metrics.jsonl`, one JSON object per line with "step" and any scalars; beside
it there may be `timing.jsonl` (in the same form), `config.json` and `result.json`. Families define
which curves share a panel; a metric in no family gets a panel named after the end of its path.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from flax import traverse_util

from common_jax.metrics import read_metrics
from common_jax.workdir import list_folder, read_json

NOT_SEARCHED = frozenset({"checkpoints", "plots", "samples"})  # large, and never hold a run
NOT_DRAWN = frozenset({"step", "epoch", "milliseconds_per_step", "train/skipped_in_row"})

Curves = Mapping[str, Mapping[int, Any]]  # name -> step -> value (a list in a heat map)


@dataclasses.dataclass(frozen=True)
class Family:
    """Metrics whose curves share a panel: those whose full name matches `pattern`."""

    title: str
    ylabel: str
    pattern: str  # its first group, if any, names the curve
    height: float = 1.35  # of the axes, in inches; adjacent panels of one height share rows
    by_split: bool = False  # names are split/term: one colour per term, markers except for train
    log: bool = False  # use a logarithmic axis if the values span more than a factor of 30
    if_any: bool = False  # leave out the panel while all values are 0


@dataclasses.dataclass(frozen=True)
class Shares:
    """Metrics that are lists of shares with sum 1. They become rows of two heat maps, one for the
    last step and one over time, coloured by share over the fair share, 1 / length."""

    title: str
    pattern: str  # its first group names the row
    item: str  # what one entry of a list is called
    unit: str  # what the shares are percentages of
    height: float = 1.6


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """A panel of shares."""

    shares: Shares
    over_time: bool

    @property
    def title(self) -> str:
        """The panel's title."""
        if self.over_time:
            return f"{self.shares.title} over time"
        return f"{self.shares.title} at the end (% of {self.shares.unit})"

    @property
    def height(self) -> float:
        """The axes' height, in inches."""
        return self.shares.height


Panels = Mapping[Family | HeatMap, Curves]

LOSS = Family("Loss", "loss", r"(.*loss.*)", 2.2, by_split=True, log=True)
ACCURACY = Family("Accuracy", "share of examples", r"(.*accuracy[^/]*)", 2.2, by_split=True)
LEARNING_RATE = Family("Learning rate", "learning rate", r"train/learning_rate")
GRADIENT_NORM = Family("Gradient norm", "L2 norm", r"train/(.*)gradient_norm", log=True)
THROUGHPUT = Family("Throughput", "examples / s", r"examples_per_second")
SKIPPED = Family("Skipped steps", "steps", r"train/skipped", if_any=True)
OF_TRAINING = (LEARNING_RATE, GRADIENT_NORM, THROUGHPUT, SKIPPED)
FAMILIES = (LOSS, ACCURACY, *OF_TRAINING)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run on disk.

    Attributes:
      folder: the run's folder.
      facts: its result or its progress, in words.
      panels: its curves.
      config: dotted key -> value as JSON.
    """

    folder: epath.Path
    facts: Sequence[str]
    panels: Panels
    config: Mapping[str, str]


def find_runs(folder: epath.Path) -> list[epath.Path]:
    """`folder` and folders below it that hold metrics, in natural sort order, each once.

    Links come last, and are followed only to runs and pipelines: others may lead anywhere.
    """
    return list(_walk(folder, set()))


def _walk(folder: epath.Path, seen: set[str]) -> Iterator[epath.Path]:
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    entries = {entry.name: entry for entry in list_folder(folder)}
    if "metrics.jsonl" in entries:
        yield folder
    links = {name for name, entry in entries.items() if os.path.islink(entry)}
    for name in sorted(entries.keys() - NOT_SEARCHED, key=lambda x: (x in links, _natural(x))):
        if name not in links or (entries[name] / "config.json").exists():
            yield from _walk(entries[name], seen)


def read_run(folder: epath.Path, families: Sequence[Family | Shares]) -> Run:
    """Reads a run's files.

    Raises:
      ValueError: for a file that cannot be read, naming it.
    """
    metrics = read_metrics(folder / "metrics.jsonl")
    timing = read_metrics(folder / "timing.jsonl") if (folder / "timing.jsonl").exists() else []
    result, config = _read_json(folder / "result.json"), _read_json(folder / "config.json")
    facts = [v if isinstance(v, str) else f"{key} {_text(v)}" for key, v in result.items()]
    if not result:
        last = [f"not finished: last line at step {line['step']}" for line in metrics[-1:]]
        facts += last or ["no metrics yet"]
    settings = {key: json.dumps(value) for key, value in config.items()}
    return Run(folder, facts, panels([*metrics, *timing], families), settings)


def panels(
    lines: Iterable[Mapping[str, Any]], families: Sequence[Family | Shares] = FAMILIES
) -> Panels:
    """The panels of a run's metrics and timing lines, with steps ascending.

    Args:
      lines: the lines; among several with the same step the last one counts, since a run that
        resumes writes some steps again.
      families: the families; among several that match a metric the first one counts.
    """
    curves: dict[Family | HeatMap, dict[str, dict[int, Any]]] = {
        family: {} for family in families if isinstance(family, Family)
    }
    rows: dict[Shares, dict[str, dict[int, Any]]] = {
        family: {} for family in families if isinstance(family, Shares)
    }
    known = tuple(curves)
    for line in lines:
        for key, value in line.items():
            if isinstance(value, list):
                for shares in rows:
                    if match := re.fullmatch(shares.pattern, key):
                        rows[shares].setdefault(match[1], {})[line["step"]] = value
            elif isinstance(value, int | float) and key not in NOT_DRAWN:
                family, label = _family_of(key, known)
                curve = curves.setdefault(family, {}).setdefault(label, {})
                curve[line["step"]] = value if math.isfinite(value) else math.nan
    for shares, lists in rows.items():
        curves[HeatMap(shares, over_time=False)] = lists
        if any(len(steps) > 1 for steps in lists.values()):
            curves[HeatMap(shares, over_time=True)] = lists
    return {
        panel: {x: dict(sorted(named[x].items())) for x in sorted(named, key=_natural)}
        for panel, named in curves.items()
        if named and not _is_idle(panel, named)
    }


def _is_idle(panel: Family | HeatMap, curves: Curves) -> bool:
    """Whether to leave out a panel because all of its values are 0."""
    optional = isinstance(panel, Family) and panel.if_any
    return optional and not any(any(curve.values()) for curve in curves.values())


def _family_of(key: str, families: Iterable[Family]) -> tuple[Family, str]:
    """A metric's family and the label of its curve, which is "" if the title says it all."""
    for family in families:
        if match := re.fullmatch(family.pattern, key):
            return family, (match.groups() or ("",))[0]
    label, _, name = key.rpartition("/")
    return Family(name.replace("_", " "), "value", f"(.*/)?{re.escape(name)}", log=True), label


def _natural(name: str) -> list[tuple[str, int]]:
    """A key that sorts block_2 before block_10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON file's nested object as `a.b.c` -> value; empty if there is no such file."""
    return traverse_util.flatten_dict(read_json(path) if path.exists() else {}, sep=".")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
