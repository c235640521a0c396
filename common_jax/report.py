"""The report of a folder of runs: one HTML page with its pictures inside, readable offline.

A run is a folder with `metrics.jsonl`, one JSON object a line with "step" and any scalars; beside
it may lie `timing.jsonl` (of the same form), `config.json` and `result.json`. `FAMILIES` says which
metric is drawn where; one that no family takes gets a panel named for its last path segment.
"""

import base64
import dataclasses
import html
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

NOT_SEARCHED = frozenset({"checkpoints", "plots", "samples"})  # large, and never hold a run
NOT_DRAWN = frozenset({"step", "epoch", "milliseconds_per_step"})
LOAD = re.compile(r"train/moe/(.+)/load")  # a list: the share of the tokens that each expert took

# Okabe and Ito's colours, which colour-blind readers tell apart; their yellow is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK = "#333333"
DPI, SLOT, TOP, BOTTOM = 110, 5.6, 0.42, 0.55  # SLOT and on in inches: a panel, its margins
LEGEND_ROW, CHARACTER, BAND = 0.19, 0.07, 0.36  # inches: for a curve's name, a letter, a layer


@dataclasses.dataclass(frozen=True)
class Family:
    """Metrics that share a panel: those whose name `pattern` matches whole.

    Attributes:
      pattern: its first group, where it has one, names the curve.
      height: of the axes, in inches; panels of one height stand side by side.
      by_split: curves are named split/term: a term has a colour, splits but train are marked.
      log: the axis is logarithmic where the values span more than a factor of 30.
      quiet: left out where all values are zero.
    """

    title: str
    ylabel: str
    pattern: str
    height: float = 1.35
    by_split: bool = False
    log: bool = False
    quiet: bool = False


FAMILIES = (
    Family("Loss", "loss", r"((?!train/moe/).*(?:loss|distillation).*)", 2.2, True, log=True),
    Family("Accuracy", "share of examples", r"(.*accuracy[^/]*)", 2.2, True),
    Family("Learning rate", "learning rate", r"train/learning_rate"),
    Family("Gradient norm", "L2 norm", r"train/gradient_norm", log=True),
    Family("Throughput", "examples / s", r"examples_per_second"),
    Family("Skipped steps", "steps", r"train/skipped", quiet=True),
    Family("Tokens dropped by experts", "share", r"train/moe/(.+)/dropped"),
    Family("Router entropy", "nats", r"train/moe/(.+)/entropy"),
)
LAST_LOAD = Family("Expert load at the end (%)", "", LOAD.pattern, 1.5)
LOAD_OVER_TIME = Family("Expert load over time", "", LOAD.pattern, 1.5)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot: `curves` is label -> step -> value (a list for a load), steps ascending."""

    family: Family
    curves: Mapping[str, Mapping[int, Any]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text. Raises ValueError for a row that is not as long as the header."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"table {self.caption!r}: row {row} needs {len(self.header)} cells, one for "
                    f"each of {self.header}; it has {len(row)}"
                )


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics or timing file, in order. A last line that lacks its newline and is
    no whole object was cut off when the run was killed, and is left out.

    Raises:
      ValueError: for any other line that is not a JSON object with an integer "step", naming file
        and line.
    """
    lines = epath.Path(path).read_bytes().split(b"\n")
    metrics = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise ValueError('not an object with an integer "step"')
        except ValueError as error:  # those of json and of the decoding among them
            if number == len(lines):
                break
            message = f"{path}, line {number}: {error}: {line[:80]!r}; mend or delete this line"
            raise ValueError(message) from error
        metrics.append(values)
    return metrics


def panels(lines: Iterable[Mapping[str, Any]]) -> tuple[Panel, ...]:
    """What a run's metrics and timing lines give to draw. Of lines with the same step the later
    counts, as a run that resumes writes some steps again."""
    found: dict[Family, dict[str, dict[int, Any]]] = {family: {} for family in FAMILIES}
    loads: dict[str, dict[int, Any]] = {}
    for line in lines:
        for key, value in line.items():
            if isinstance(value, list) and (match := LOAD.fullmatch(key)):
                loads.setdefault(match[1], {})[line["step"]] = value
            elif isinstance(value, int | float) and key not in NOT_DRAWN:
                family, label = _family_of(key)
                curve = found.setdefault(family, {}).setdefault(label, {})
                curve[line["step"]] = value if math.isfinite(value) else math.nan
    result = [
        Panel(family, _in_order(curves))
        for family, curves in found.items()
        if curves and not (family.quiet and not any(any(c.values()) for c in curves.values()))
    ]
    if loads:
        result.append(Panel(LAST_LOAD, _in_order(loads)))
    if any(len(load) > 1 for load in loads.values()):
        result.append(Panel(LOAD_OVER_TIME, _in_order(loads)))
    return tuple(result)


def write_report(
    workdir: epath.PathLike,
    *,
    title: str,
    table: Table | None = None,
    figures: Sequence[tuple[str, epath.PathLike]] = (),
) -> epath.Path:
    """Writes `workdir/report.html`, on every run in or below `workdir`, and each run's plots to
    `workdir/plots/<run>/curves.png`; returns the page's path. The same files give the same bytes.

    Args:
      workdir: searched for folders that hold `metrics.jsonl`.
      title: the page's heading.
      table: the outcome, shown first.
      figures: (caption, PNG file) of further pictures, shown under the table.

    Raises:
      ValueError: for a file of a run that cannot be read, naming it.
    """
    workdir = epath.Path(workdir)
    sections = []  # (anchor, heading, HTML)
    if table is not None:
        sections.append(("table", "Results", _table_html(table)))
    if figures:
        images = [_image_html(epath.Path(png).read_bytes(), text, text) for text, png in figures]
        sections.append(("figures", "Comparison", "".join(images)))
    for number, run in enumerate(_find_runs(workdir)):
        relative = run.relative_to(workdir)
        name = workdir.name or "run" if run == workdir else str(relative)
        content = _run_html(run, name, workdir / "plots" / relative)
        sections.append((f"run-{number}", name, content))
    if not any(anchor.startswith("run-") for anchor, _, _ in sections):
        sections.append(("runs", "No runs", "<p>No folder here holds metrics.jsonl.</p>"))
    contents, body = "", ""
    for anchor, heading, content in sections:
        folder, slash, name = heading.rpartition("/")
        heading = f"<small>{html.escape(folder + slash)}</small>{html.escape(name)}"
        contents += f'<li><a href="#{anchor}">{heading}</a></li>\n'
        body += f'<section id="{anchor}"><h2>{heading}</h2>\n{content}</section>\n'
    path = workdir / "report.html"
    page = PAGE.format(title=html.escape(title), style=STYLE, contents=contents, body=body)
    path.write_text(page)
    return path


def overlay(
    curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
    *,
    label: str,
    path: epath.PathLike,
) -> None:
    """Writes a PNG that compares groups of curves: thin lines for a group's curves, a bold one for
    their mean at the steps that all share, and a band from their least to their greatest there.

    Args:
      curves: group -> its curves, for example one a seed, each a sequence of (step, value).
      label: what the values are, with the unit.
      path: where the PNG goes.

    Raises:
      ValueError: for a group without curves, or a curve without points.
    """
    figure = Figure(figsize=(6.4, 4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for (group, members), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        if not members or not all(members):
            raise ValueError(f"group {group!r}: {members!r} needs curves of at least one point")
        for member in members:
            axes.plot(*zip(*sorted(member), strict=True), color=colour, linewidth=0.8, alpha=0.4)
        by_step = [dict(member) for member in members]
        shared = sorted(set.intersection(*map(set, by_step)))
        values = np.array([[values[step] for step in shared] for values in by_step], float)
        least, greatest = values.min(0), values.max(0)
        axes.fill_between(shared, least, greatest, color=colour, alpha=0.13, linewidth=0)
        name = f"{group} (mean of {len(members)})" if len(members) > 1 else group
        mark = "o" if len(shared) <= 30 else ""
        style = {"color": colour, "linewidth": 2.2, "marker": mark, "markersize": 3.5}
        axes.plot(shared, values.mean(0), label=name, **style)
    _finish(axes, title="", ylabel=label)
    legend = figure.legend(loc="outside upper left", ncols=2, fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    epath.Path(path).write_bytes(_png(figure))


# Reading.


def _find_runs(folder: epath.Path) -> list[epath.Path]:
    """Folders in and below `folder` that hold metrics; numbers in their names count."""
    runs = [folder] if (folder / "metrics.jsonl").exists() else []
    for entry in sorted(folder.iterdir(), key=lambda entry: _natural(entry.name)):
        if entry.name not in NOT_SEARCHED and entry.is_dir():
            runs += _find_runs(entry)
    return runs


def _read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON file flattened to `a.b.c` -> value; empty where there is no such file."""
    try:
        return dict(_flatten(json.loads(path.read_text()), "")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}; mend or delete this file") from error


def _flatten(value: Any, key: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict) or (key and not value):
        yield key, value
        return
    for name, entry in value.items():
        yield from _flatten(entry, f"{key}.{name}" if key else name)


def _family_of(key: str) -> tuple[Family, str]:
    """The family of a metric and the label of its curve."""
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, key):
            return family, (match.groups() or (family.title,))[0]
    label, _, name = key.rpartition("/")
    family = Family(name.replace("_", " "), "value", f"(.*){re.escape(name)}", log=True)
    return family, label.removeprefix("train/moe/") or family.title


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block_2 before block_10."""
    return [(int(digits or -1), text) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _in_order(curves: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[int, Any]]:
    return {name: dict(sorted(curves[name].items())) for name in sorted(curves, key=_natural)}


# Drawing.


def _draw(plots: Sequence[Panel]) -> bytes:
    """A PNG of a run's panels, two in a row; laid out here, in inches, because matplotlib's layout
    engines draw everything twice."""
    rows = []
    for _, group in itertools.groupby(plots, lambda panel: panel.family.height):
        members = list(group)
        rows += [members[i : i + 2] for i in range(0, len(members), 2)]
    heights = [max(map(_height, row)) for row in rows]
    y = total = sum(heights) + (TOP + BOTTOM) * len(rows)
    figure = Figure(figsize=(2 * SLOT, total), dpi=DPI)
    for row, height in zip(rows, heights, strict=True):
        y -= TOP + height
        for place, panel in enumerate(row):
            names = CHARACTER * max(map(len, panel.curves))
            heat = panel.family in (LAST_LOAD, LOAD_OVER_TIME)
            left, right = (names + 0.3, 0.1) if heat else (0.75, names + 0.55)
            right = right if heat or _legend_needed(panel) else 0.25
            x, width = (place * SLOT + left) / (2 * SLOT), (SLOT - left - right) / (2 * SLOT)
            axes = figure.add_axes((x, y / total, width, height / total))
            (_draw_load if heat else _draw_curves)(axes, panel)
        y -= BOTTOM
    return _png(figure)


def _height(panel: Panel) -> float:
    heat = panel.family in (LAST_LOAD, LOAD_OVER_TIME)
    return max(panel.family.height, (BAND if heat else LEGEND_ROW) * len(panel.curves))


def _legend_needed(panel: Panel) -> bool:
    return list(panel.curves) != [panel.family.title]


def _draw_curves(axes: Axes, panel: Panel) -> None:
    split = panel.family.by_split
    terms = {label: label.partition("/")[2] if split else label for label in panel.curves}
    distinct = list(dict.fromkeys(terms.values()))
    colours = dict(zip(distinct, _colours(len(distinct)), strict=True))
    for label, curve in panel.curves.items():
        marked = len(curve) == 1 or (split and not label.startswith("train/"))
        axes.plot(
            list(curve),
            list(curve.values()),
            "o--" if marked else "-",
            color=colours[terms[label]],
            label=label,
            linewidth=1.3,
            markersize=3.5,
            markevery=max(1, len(curve) // 15),
        )
    values = np.array([value for curve in panel.curves.values() for value in curve.values()])
    values = values[np.isfinite(values)]
    if panel.family.log and values.size and 0 < 30 * values.min() < values.max():
        axes.set_yscale("log")
    _finish(axes, title=panel.family.title, ylabel=panel.family.ylabel)
    if _legend_needed(panel):
        legend = axes.legend(loc="upper left", bbox_to_anchor=(1, 1.06), fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _draw_load(axes: Axes, panel: Panel) -> None:
    """A band a layer, white at the fair share 1/E. At the end: a column an expert. Over time: a
    line an expert, a column the steps since the line before, at most 400 of them."""
    loads = [np.array(list(load.values()), float) for load in panel.curves.values()]
    experts = [load.shape[1] for load in loads]
    top = max(2.0, *(np.nanmax(load) * load.shape[1] for load in loads))
    over_time = panel.family is LOAD_OVER_TIME
    for row, (layer, load) in enumerate(zip(panel.curves.values(), loads, strict=True)):
        x, y, cells = np.arange(experts[row] + 1) - 0.5, [row - 0.5, row + 0.5], load[-1:]
        if over_time:
            every = math.ceil(len(load) / 400)
            steps = list(layer)[::every]
            x = [2 * steps[0] - (steps[1] if len(steps) > 1 else steps[0] + 1), *steps]
            y, cells = np.linspace(row - 0.5, row + 0.5, experts[row] + 1), load[::every].T
        elif max(experts) <= 16:
            for expert, share in enumerate(load[-1]):
                relative = share * experts[row]
                colour = "white" if relative < 0.25 or relative > 0.3 + 0.7 * top else INK
                text = f"{100 * share:.0f}"
                axes.text(expert, row, text, color=colour, size=8, ha="center", va="center")
        norm = TwoSlopeNorm(1, 0, top)
        image = axes.pcolorfast(x, y, cells * experts[row], cmap="RdBu_r", norm=norm)
        axes.axhline(row - 0.5, color=INK, linewidth=0.8)
    bar = axes.figure.colorbar(image, ax=axes, ticks=(0, 1, top), format="%.2g", pad=0.02)
    bar.ax.tick_params(labelsize=8, length=2, colors=INK)
    bar.set_label("load / fair share", size=8, color=INK)
    _finish(axes, title=panel.family.title, ylabel="")
    axes.set_xlabel("step (one line an expert)" if over_time else "expert", size=8, color=INK)
    axes.set_yticks(range(len(loads)), list(panel.curves), parse_math=False)
    axes.set(ylim=(len(loads) - 0.5, -0.5), facecolor="#d8d8d8")
    axes.grid(False)


def _finish(axes: Axes, *, title: str, ylabel: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", size=8, color=INK)
    axes.set_ylabel(ylabel, size=8, color=INK, parse_math=False)
    axes.set_title(title, size=10, weight="bold", color=INK, loc="left", parse_math=False)


def _colours(count: int) -> Sequence[Any]:
    if count <= len(COLOURS):
        return COLOURS[:count]
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.9, count)]


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


# Writing.


def _run_html(run: epath.Path, name: str, plots: epath.Path) -> str:
    metrics, timing = (
        read_metrics(run / file) if (run / file).exists() else []
        for file in ("metrics.jsonl", "timing.jsonl")
    )
    result, config = _read_json(run / "result.json"), _read_json(run / "config.json")
    facts = [
        value if isinstance(value, str) else f"{k} {_text(value)}" for k, value in result.items()
    ]
    if not metrics:
        facts.append("no metrics yet")
    elif not result:
        facts.append(f"not finished: last line at step {metrics[-1]['step']}")
    if speeds := [line["examples_per_second"] for line in timing if "examples_per_second" in line]:
        facts.append(f"median {_text(float(np.median(speeds)))} examples / s")
    content = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
    content = f'<p class="facts">{content}</p>\n'
    if found := panels([*metrics, *timing]):
        plots.mkdir(parents=True, exist_ok=True)
        png = _draw(found)
        (plots / "curves.png").write_bytes(png)
        titles = ", ".join(panel.family.title for panel in found)
        content += _image_html(png, f"Curves of {name}: {titles}", "")
    if config:
        rows = tuple((key, _text(value)) for key, value in config.items())
        table = _table_html(Table("", ("key", "value"), rows))
        content += f"<details><summary>Config</summary>\n{table}</details>\n"
    return content


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _table_html(table: Table) -> str:
    head, *rows = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        for tag, cells in (("th", table.header), *(("td", row) for row in table.rows))
    )
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>\n"


def _image_html(png: bytes, alt: str, caption: str) -> str:
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>\n"


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #22252a; --faint: #676d76; --line: #dcdfe4 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17191d; --ink: #e2e4e8; --faint: #9aa0aa; --line: #363a42 }
  img { filter: brightness(.9) } }
body { margin: 0 auto; padding: 1.5rem; max-width: 96rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { margin: 0 0 1rem; line-height: 1.2 } h2 { margin: 0 0 .5rem; font-size: 1.25rem }
small, figcaption, caption, summary { color: var(--faint); font-size: .9rem }
ul { list-style: none; margin: 0; padding: 0; font-size: .9rem } a { color: inherit }
section { border-top: 1px solid var(--line); padding: 1.5rem 0 }
.facts span { display: inline-block; margin: 0 1.2rem 0 0 } figure { margin: 1rem 0 }
img { max-width: 100%; background: #fff; border-radius: 6px } caption { text-align: left }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .92rem }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line) }
#table td { font-variant-numeric: tabular-nums } details td { font: .82rem monospace }
@media (min-width: 70rem) { body { display: grid; grid-template-columns: 14rem 1fr; gap: 0 2rem }
  main { min-width: 0 } nav { position: sticky; top: 1rem; max-height: 96vh; overflow: auto } }
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{style}</style></head>
<body><nav><ul>
{contents}</ul></nav>
<main><h1>{title}</h1>
{body}</main></body></html>
"""
