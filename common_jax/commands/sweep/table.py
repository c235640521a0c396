"""The table of a sweep's finished runs: sweep.csv, sweep.md, sweep.png."""

import csv
import dataclasses
import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common_jax.commands.sweep.cells import Cell, short_keys
from common_jax.commands.sweep.jobs import deviation
from common_jax.config import did_you_mean
from common_jax.report import Table
from common_jax.report.draw import COLOURS, DPI, INK
from common_jax.workdir import contradictions, read_json, write_bytes

MARKERS = "os^Dv*P"
NOT_SCORES = ("step", "sentences")  # numbers in scores.json that are not scores
TWIN = " †"
TWINS = (
    "; †: every number equals that of another cell to the last digit, so the runs may not read "
    "what differs between them"
)
WIDE = 30  # swept values that span more than this factor get a logarithmic axis


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell of the grid.

    Attributes:
      swept: text by key.
      results: metrics of each finished seed.
    """

    swept: Mapping[str, str]
    results: Sequence[Mapping[str, float]]

    def values(self, metric: str) -> list[float]:
        """The metric's values, one per finished seed that has it."""
        return [result[metric] for result in self.results if metric in result]


def read_results(folder: epath.Path, cell: Cell, seed: int) -> dict[str, float] | None:
    """All final numbers of a cell's runs, by name; None unless all are finished.

    A metric of the cell's main run goes by its own name, `test/accuracy`; one of another run is
    prefixed with its folder, `FOLDER/test/accuracy`. Numbers from scores.json are prefixed with
    `test/`.

    Raises:
      ValueError: if the folder holds a run whose config is not the cell's.
    """
    found: dict[str, float] = {}
    if (folder / "config.json").exists():
        one = {**cell.config, "seed": seed}
        if lines := contradictions(read_json(folder / "config.json"), one, workdir=folder):
            shown = "\n  ".join(line[:120] for line in lines[:10])
            raise ValueError(
                f"{folder} holds a run whose config differs from this cell of the sweep (its value "
                f"first):\n  {shown}\nmove it away, or give another --workdir"
            )
    for run, names in cell.files.items():
        if not all((folder / run / name).exists() for name in names):
            return None
        numbers: dict[str, float] = {}
        for name in names:
            content = read_json(folder / run / name)
            prefix = "test/" if name == "scores.json" else ""
            numbers |= {
                f"{prefix}{key}": value
                for key, value in content.items()
                if isinstance(value, int | float) and key not in NOT_SCORES
            }
        if run:
            found |= {f"{run}/{key}": value for key, value in numbers.items()}
        if run == cell.main:
            found |= numbers
    return found


def sort_rows(rows: Sequence[Row]) -> list[Row]:
    """Sorts by the swept values: numbers by size, others in order of appearance."""
    keys = list(rows[0].swept)
    orders = {key: _order([row.swept[key] for row in rows]) for key in keys}
    return sorted(rows, key=lambda row: [orders[key].index(row.swept[key]) for key in keys])


def missing_metrics(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """The error for metrics that no finished run has, listing those that exist; "" if all exist."""
    known = sorted({name for row in rows for result in row.results for name in result})
    missing = [metric for metric in metrics if known and metric not in known]
    lines = [f"--metric={one}: no finished run has it{did_you_mean(one, known)}" for one in missing]
    there = f"there are {', '.join(known)}; run the command again with one of these"
    return "; ".join([*lines, there]) if missing else ""


def write_table(workdir: epath.Path, rows: Sequence[Row], metrics: Sequence[str]) -> Table:
    """Writes sweep.csv, sweep.md and sweep.png, with empty entries for cells without results;
    returns the table in the form for people."""
    keys = list(rows[0].swept)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{metric} {what}" for metric in metrics for what in ("mean", "spread", "n")]
    writer.writerow([*(key.removeprefix(":") for key in keys), *columns])
    for row in rows:
        numbers = [number for metric in metrics for number in _numbers(row.values(metric))]
        writer.writerow([*row.swept.values(), *numbers])
    write_bytes(workdir / "sweep.csv", text.getvalue().encode())
    names = short_keys(keys)
    header = (*names.values(), *itertools.chain(*((metric, "n") for metric in metrics)))
    twins, lines = find_twins(rows), []
    for place, row in enumerate(rows):
        cells = list(row.swept.values())
        for metric in metrics:
            values = row.values(metric)
            mark = TWIN if values and place in twins else ""
            cells += [f"{_mean_and_spread(values)}{mark}", str(len(values))]
        lines.append(tuple(cells))
    caption = "Mean ± sample standard deviation over n seeds" + (TWINS if twins else "")
    table = Table(caption, header, tuple(lines))
    write_bytes(workdir / "sweep.md", _markdown(table).encode())
    picture = io.BytesIO()
    FigureCanvasAgg(plot(rows, metrics)).print_png(picture)
    write_bytes(workdir / "sweep.png", picture.getvalue())
    return table


def find_twins(rows: Sequence[Row]) -> set[int]:
    """Indices of the rows whose numbers all equal those of another row, to the last digit, for as
    many seeds as both have."""
    texts = [[repr(sorted(result.items())) for result in row.results] for row in rows]
    twins = set()
    for (place, own), (other, one) in itertools.combinations(enumerate(texts), 2):
        shared = min(len(own), len(one))
        if shared and own[:shared] == one[:shared]:
            twins |= {place, other}
    return twins


def plot(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    """One panel per metric, plotted against the first swept key; one line per setting of the other
    keys, with error bars of one sample standard deviation."""
    first, *others = rows[0].swept
    names = short_keys(rows[0].swept)
    ticks = _order([row.swept[first] for row in rows])
    numbers = _as_numbers(ticks)
    places = dict(zip(ticks, numbers or range(len(ticks)), strict=True))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(f"{names[key]} {row.swept[key]}" for key in others)
        lines.setdefault(label, []).append(row)
    figure = Figure(figsize=(6.4 * len(metrics), 4.2), dpi=DPI, layout="constrained")
    for axes, metric in zip(np.ravel(figure.subplots(1, len(metrics))), metrics, strict=True):
        for number, (label, members) in enumerate(lines.items()):
            found = [row for row in members if row.values(metric)]
            values = [row.values(metric) for row in found]
            axes.errorbar(
                [places[row.swept[first]] for row in found],
                [statistics.mean(one) for one in values],
                [deviation(one) if len(one) > 1 else 0 for one in values],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number // len(COLOURS) % len(MARKERS)],
                linestyle="-" if numbers else ":",
                markersize=5,
                elinewidth=1,
                capsize=3,
                label=_plain(label),
            )
        if numbers and numbers[0] > 0 and numbers[-1] > WIDE * numbers[0]:
            axes.set_xscale("log")
        axes.set_xticks(list(places.values()), [_plain(tick) for tick in ticks])
        axes.minorticks_off()
        if not numbers:
            axes.margins(x=0.15)
        axes.tick_params(labelsize=8, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e4e4e4", linewidth=0.7)
        axes.set_xlabel(_plain(first.removeprefix(":")), size=9, color=INK)
        axes.set_ylabel(_plain(metric), size=9, color=INK)
    if others:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    return figure


def _numbers(values: Sequence[float]) -> tuple[str, str, str]:
    """Mean, spread and n as text; "" for what is not defined."""
    mean = repr(statistics.mean(values)) if values else ""
    spread = repr(deviation(values)) if len(values) > 1 else ""
    return mean, spread, str(len(values))


def _mean_and_spread(values: Sequence[float]) -> str:
    """Mean and spread, rounded to the second digit of the spread; without a spread, four digits of
    the mean."""
    if not values:
        return ""
    mean, spread = statistics.mean(values), deviation(values) if len(values) > 1 else 0.0
    if not spread or not math.isfinite(spread):
        return f"{mean:.4g}" + (f" ± {spread:.2g}" if len(values) > 1 else "")
    decimals = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


def _as_numbers(texts: Sequence[str]) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def _order(texts: Sequence[str]) -> list[str]:
    """Each text once: by size if all are numbers, else in order of appearance."""
    once = list(dict.fromkeys(texts))
    return once if _as_numbers(once) is None else sorted(once, key=float)


def _markdown(table: Table) -> str:
    lines = [table.header, ("---",) * len(table.header), *table.rows]
    texts = (" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines)
    return f"{table.caption}.\n\n" + "".join(f"| {text} |\n" for text in texts)


def _plain(text: str) -> str:
    """Escapes text so that matplotlib does not render it as mathematics."""
    return text.replace("$", r"\$")
