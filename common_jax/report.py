"""The report of a folder of runs: one HTML page with its pictures inside, readable offline.

A run is a folder with `metrics.jsonl`, one JSON object a line with "step" and any scalars; beside
it may lie `timing.jsonl` (of the same form), `config.json` and `result.json`. `FAMILIES` says which
metric is drawn where; one that no family takes gets a panel named for its last path segment.
"""

import base64
import contextlib
import dataclasses
import html
import itertools
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from flax import traverse_util
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

from common_jax.metrics import read_metrics
from common_jax.workdir import read_json, write_bytes

NOT_SEARCHED = frozenset({"checkpoints", "plots", "samples"})  # large, and never hold a run
NOT_DRAWN = frozenset({"step", "epoch", "milliseconds_per_step", "train/skipped_in_row"})

Curves = Mapping[str, Mapping[int, Any]]  # name -> step -> value (a list for a load)
CurveGroups = Mapping[str, Sequence[Sequence[tuple[int, float]]]]

# Okabe and Ito's colours, which colour-blind readers tell apart; their yellow is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK = "#333333"
DPI, SLOT, TOP, BOTTOM = 110, 5.6, 0.42, 0.55  # SLOT and on in inches: a panel, its margins
NAME, LETTER = 0.22, 0.07  # inches: the height for a curve's name or a layer, a letter's width


@dataclasses.dataclass(frozen=True)
class Family:
    """Metrics that share a panel: those whose name `pattern` matches whole."""

    title: str
    ylabel: str
    pattern: str  # its first group, where it has one, names the curve
    height: float = 1.35  # of the axes, in inches; neighbours of one height stand side by side
    by_split: bool = False  # curves are split/term: a term has a colour, splits but train marks
    log: bool = False  # a logarithmic axis where the values span more than a factor of 30


SKIPPED = Family("Skipped steps", "steps", r"train/skipped")
FAMILIES = (
    Family("Loss", "loss", r"((?!train/moe/).*(?:loss|distillation).*)", 2.2, True, log=True),
    Family("Accuracy", "share of examples", r"(.*accuracy[^/]*)", 2.2, True),
    Family("BLEU", "BLEU, 0 to 100", r"((?:.*/)?bleu(?:_lower)?)", 2.2),
    Family("chrF, METEOR, exact matches", "0 to 100", r"((?:.*/)?(?:chrf|meteor|exact))", 2.2),
    Family("Learning rate", "learning rate", r"train/learning_rate"),
    Family("Gradient norm", "L2 norm", r"train/(.*)gradient_norm", log=True),
    Family("Throughput", "examples / s", r"examples_per_second"),
    SKIPPED,
    Family("Tokens dropped by experts", "share", r"train/moe/(.+)/dropped", 1.5),
    Family("Router entropy", "nats", r"train/moe/(.+)/entropy", 1.5),
)
LOAD = r"train/moe/(.+)/load"  # a list: the share of the tokens that each expert took
LAST_LOAD = Family("Expert load at the end (% of tokens)", "", LOAD, 1.6)
LOAD_OVER_TIME = Family("Expert load over time", "", LOAD, 1.6)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text and small pictures, which are PNG files' bytes; rows as long as its
    header."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | bytes, ...], ...]


def panels(lines: Iterable[Mapping[str, Any]]) -> dict[Family, Curves]:
    """What a run's metrics and timing lines give to draw: a panel a family, steps ascending. Of
    lines with the same step the later counts, as a run that resumes writes some steps again."""
    found: dict[Family, dict[str, dict[int, Any]]] = {family: {} for family in FAMILIES}
    loads: dict[str, dict[int, Any]] = {}
    for line in lines:
        for key, value in line.items():
            if isinstance(value, list) and (match := re.fullmatch(LOAD, key)):
                loads.setdefault(match[1], {})[line["step"]] = value
            elif isinstance(value, int | float) and key not in NOT_DRAWN:
                family, label = _family_of(key)
                curve = found.setdefault(family, {}).setdefault(label, {})
                curve[line["step"]] = value if math.isfinite(value) else math.nan
    found[LAST_LOAD] = loads
    found[LOAD_OVER_TIME] = loads if any(len(load) > 1 for load in loads.values()) else {}
    return {
        family: {x: dict(sorted(curves[x].items())) for x in sorted(curves, key=_natural)}
        for family, curves in found.items()
        if curves and (family is not SKIPPED or any(curves[""].values()))
    }


def write_report(
    workdir: epath.PathLike,
    *,
    title: str,
    table: Table | None = None,
    tables: Sequence[Table] = (),
    figures: Sequence[tuple[str, epath.PathLike]] = (),
) -> epath.Path:
    """Writes `workdir/report.html`, on every run in or below `workdir`, and each run's plots to its
    own `plots/curves.png`, unless they are newer than its metrics; returns the page's path. The
    same files give the same bytes, and nothing is written that is there already.

    Args:
      workdir: searched for folders that hold `metrics.jsonl`.
      title: the page's heading.
      table: the outcome, shown first.
      tables: further ones, each a section headed with its caption, shown next.
      figures: (caption, PNG file) of further pictures, shown under the tables.

    Raises:
      ValueError: for a file of a run that cannot be read, naming it.
      OSError: when the page cannot be written; a run's plots that cannot be are a warning.
    """
    workdir = epath.Path(workdir)
    sections = []  # (anchor, heading, HTML)
    if table is not None:
        sections.append(("table", "Results", _table_html(table)))
    for number, further in enumerate(tables):
        content = _table_html(dataclasses.replace(further, caption=""))
        sections.append((f"table-{number}", further.caption, content))
    if figures:
        images = [_image_html(epath.Path(png).read_bytes(), text, text) for text, png in figures]
        sections.append(("figures", "Comparison", "".join(images)))
    runs = _find_runs(workdir)
    for number, run in enumerate(runs):
        name = workdir.name or "run" if run == workdir else str(run.relative_to(workdir))
        content = _run_html(run, name)
        sections.append((f"run-{number}", name, content))
    if not runs:
        sections.append(("runs", "No runs", "<p>No folder here holds metrics.jsonl.</p>"))
    contents, body = "", ""
    for anchor, heading, content in sections:
        folder, slash, name = heading.rpartition("/")
        heading = f"<small>{html.escape(folder + slash)}</small>{html.escape(name)}"
        contents += f'<li><a href="#{anchor}">{heading}</a></li>\n'
        body += f'<section id="{anchor}"><h2>{heading}</h2>\n{content}</section>\n'
    path = workdir / "report.html"
    page = PAGE.format(title=html.escape(title), style=STYLE, contents=contents, body=body)
    if not path.exists() or path.read_bytes() != page.encode():
        write_bytes(path, page.encode())
    return path


@contextlib.contextmanager
def dispensable(path: epath.PathLike) -> Iterator[None]:
    """A block that makes a report or a picture: what fails there is a warning, which names `path`,
    and no error of the run. Its own mistakes show their traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        logging.warning("%s could not be made (%s); the run itself is whole", path, error)
    except Exception:
        logging.warning("%s could not be made; the run itself is whole", path, exc_info=True)


def is_picture(path: epath.PathLike) -> bool:
    """Whether a file is there and is a whole PNG, not one that a full disk cut off."""
    try:
        content = epath.Path(path).read_bytes()
        with Image.open(BytesIO(content), formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # all three are PIL's, for what it cannot read
        return False
    return content[-8:-4] == b"IEND"  # PIL accepts a file without this last chunk


def overlay(curves: CurveGroups, *, label: str, path: epath.PathLike) -> None:
    """Writes a PNG that compares groups of curves: thin lines for a group's curves, a bold one for
    their mean at the steps that all share, and a band from their least to their greatest there.

    Args:
      curves: group -> its curves, for example one a seed, each a sequence of (step, value).
      label: what the values are, with the unit.

    Raises:
      ValueError: for a group without curves, or a curve without points.
    """
    figure = Figure(figsize=(6.4, 4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for (group, members), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        if not members or not all(members):
            raise ValueError(f"group {group!r}: {members!r} needs curves of at least one point")
        by_step = [dict(sorted(member)) for member in members]
        for curve in by_step:
            axes.plot(list(curve), list(curve.values()), color=colour, linewidth=0.8, alpha=0.4)
        shared = sorted(set.intersection(*map(set, by_step)))
        values = np.array([[curve[step] for step in shared] for curve in by_step], float)
        axes.fill_between(shared, values.min(0), values.max(0), color=colour, alpha=0.13, lw=0)
        name = f"{group} (mean of {len(members)})" if len(members) > 1 else group
        axes.plot(shared, values.mean(0), ".-", color=colour, lw=2.2, label=_plain(name))
    _finish(axes, ylabel=label)
    short = all(len(name) <= 40 for name in axes.get_legend_handles_labels()[1])
    figure.legend(loc="outside upper left", ncols=2 if short else 1, fontsize=9, frameon=False)
    write_bytes(path, _png(figure))


def _find_runs(folder: epath.Path) -> list[epath.Path]:
    """Folders in and below `folder` that hold metrics; numbers in their names count."""
    runs = [folder] if (folder / "metrics.jsonl").exists() else []
    for entry in sorted(folder.iterdir(), key=lambda entry: _natural(entry.name)):
        if entry.name not in NOT_SEARCHED and entry.is_dir():
            runs += _find_runs(entry)
    return runs


def _read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON file's nested object as `a.b.c` -> value; empty where there is no such file."""
    try:
        values = read_json(path) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}; mend or delete this file") from error
    return traverse_util.flatten_dict(values, sep=".")


def _family_of(key: str) -> tuple[Family, str]:
    """The family of a metric and the label of its curve, empty where the family says it all."""
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, key):
            return family, (match.groups() or ("",))[0]
    label, _, name = key.rpartition("/")
    family = Family(name.replace("_", " "), "value", f"(.*/)?{re.escape(name)}", log=True)
    return family, label.removeprefix("train/moe/")


def _natural(name: str) -> list[tuple[str, int]]:
    """Sorts block_2 before block_10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _draw(plots: Mapping[Family, Curves]) -> bytes:
    """A PNG of a run's panels, two in a row; laid out here, in inches, because matplotlib's layout
    engines draw everything twice."""
    rows = []
    for _, group in itertools.groupby(plots, lambda family: family.height):
        members = list(group)
        rows += [members[i : i + 2] for i in range(0, len(members), 2)]
    heights = [max(row[0].height, *(NAME * len(plots[x]) for x in row)) for row in rows]
    y = total = sum(heights) + (TOP + BOTTOM) * len(rows)
    figure = Figure(figsize=(2 * SLOT, total), dpi=DPI)
    for row, height in zip(rows, heights, strict=True):
        y -= TOP + height
        for place, family in enumerate(row):
            curves, heat = plots[family], family in (LAST_LOAD, LOAD_OVER_TIME)
            names = LETTER * max(map(len, curves))
            left, right = (names + 0.3, 0.25) if heat else (0.75, names + 0.5)
            x, width = (place * SLOT + left) / (2 * SLOT), (SLOT - left - right) / (2 * SLOT)
            axes = figure.add_axes((x, y / total, width, height / total))
            (_draw_load if heat else _draw_curves)(axes, family, curves)
            axes.set_title(_plain(family.title), size=10, weight="bold", loc="left", y=1.04)
        y -= BOTTOM
    return _png(figure)


def _draw_curves(axes: Axes, family: Family, curves: Curves) -> None:
    terms = [x.partition("/")[2] if family.by_split else x for x in curves]
    count = len(set(terms))
    many = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))
    palette = COLOURS if count <= len(COLOURS) else many
    colours = dict(zip(dict.fromkeys(terms), palette, strict=False))
    for (label, curve), term in zip(curves.items(), terms, strict=True):
        marked = len(curve) == 1 or (family.by_split and not label.startswith("train/"))
        steps, values = np.array(list(curve.items())).T
        (line,) = axes.plot(steps, values, "o--" if marked else "-", lw=1.3, markersize=3.5)
        line.set(color=colours[term], label=_plain(label), markevery=max(1, len(curve) // 15))
    _finish(axes, ylabel=family.ylabel)
    finite = [v for curve in curves.values() for v in curve.values() if not math.isnan(v)]
    if family.log and finite and 0 < 30 * min(finite) < max(finite):
        axes.set_yscale("log", subs=())
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:.4g}")
    if any(curves):
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1.06), fontsize=8, frameon=False)


def _draw_load(axes: Axes, family: Family, curves: Curves) -> None:
    """A band a layer, coloured by load over the fair share 1/E. At the end: a column an expert.
    Over time: a line an expert, a column the steps since the line before, at most 400 of them."""
    norm, over_time = LogNorm(1 / 4, 4), family is LOAD_OVER_TIME
    for row, load in enumerate(curves.values()):
        shares = np.array(list(load.values()), float)
        experts = shares.shape[1]
        x, y, cells = np.arange(experts + 1) - 0.5, (row - 0.5, row + 0.5), shares[-1:]
        if over_time:
            every = math.ceil(len(load) / 400)
            steps = list(load)[::every]
            x = [2 * steps[0] - (steps[1] if len(steps) > 1 else steps[0] + 1), *steps]
            y, cells = np.linspace(row - 0.5, row + 0.5, experts + 1), shares[::every].T
        elif experts <= 16:
            for expert, percent in enumerate(100 * shares[-1]):
                ink = INK if 40 < percent * experts < 250 else "white"
                text = axes.text(expert, row, f"{percent:.0f}", color=ink, size=8, ha="center")
                text.set_verticalalignment("center")
        cells = np.clip(cells * experts, norm.vmin, norm.vmax)
        image = axes.pcolorfast(x, y, cells, cmap="RdBu_r", norm=norm)
        axes.axhline(row - 0.5, color=INK, linewidth=0.8)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_ticks((1 / 4, 1 / 2, 1, 2, 4), labels=("≤ ¼", "½", "1", "2", "≥ 4"), size=8, color=INK)
    bar.minorticks_off()
    bar.set_label("load / fair share", size=8, color=INK)
    _finish(axes, ylabel="")
    axes.set_xlabel("step (a line an expert)" if over_time else "expert", size=8, color=INK)
    axes.set_yticks(range(len(curves)), [_plain(layer) for layer in curves])
    axes.set(ylim=(len(curves) - 0.5, -0.5), facecolor="#d8d8d8")
    axes.grid(False)


def _finish(axes: Axes, *, ylabel: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.xaxis.set(major_locator=MaxNLocator(5, integer=True), major_formatter="{x:,.0f}")
    axes.yaxis.set(major_locator=MaxNLocator(5, steps=(1, 2, 5, 10)), major_formatter="{x:.4g}")
    axes.set_xlabel("step", size=8, color=INK)
    axes.set_ylabel(_plain(ylabel), size=8, color=INK)
    # With a place given, matplotlib does not measure the whole panel to find one.
    axes.xaxis.set_label_coords(0.5, -33 / axes.bbox.height)
    axes.yaxis.set_label_coords(-58 / axes.bbox.width, 0.5)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics, whatever a metric is called."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    file = BytesIO()
    # A palette makes the file a third, and is faster to compress.
    image.quantize(200, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "png")
    return file.getvalue()


def _run_html(run: epath.Path, name: str) -> str:
    metrics = read_metrics(run / "metrics.jsonl")
    timing = read_metrics(run / "timing.jsonl") if (run / "timing.jsonl").exists() else []
    result, config = _read_json(run / "result.json"), _read_json(run / "config.json")
    facts = [v if isinstance(v, str) else f"{key} {_text(v)}" for key, v in result.items()]
    if not result:
        last = [f"not finished: last line at step {line['step']}" for line in metrics[-1:]]
        facts += last or ["no metrics yet"]
    content = "".join(f"<span>{html.escape(fact)}</span>\n" for fact in facts)
    if found := panels([*metrics, *timing]):
        titles = ", ".join(family.title for family in found)
        content += _image_html(_drawn(found, run), f"{name}: {titles}", "")
    if config:
        table = Table("", ("key", "value"), tuple((k, json.dumps(v)) for k, v in config.items()))
        content += f"<details><summary>Config</summary>\n{_table_html(table)}</details>\n"
    return content


def _drawn(found: Mapping[Family, Curves], run: epath.Path) -> bytes:
    """The run's picture; drawn again only when its metrics have changed since, or it is broken."""
    path = run / "plots" / "curves.png"
    if is_picture(path) and path.stat().mtime > (run / "metrics.jsonl").stat().mtime:
        return path.read_bytes()
    picture = _draw(found)
    try:
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, picture)
    except OSError as error:
        logging.warning("%s could not be written (%s)", path, error)
    return picture


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _table_html(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{x}</{tag}>" for x in cells) + "</tr>\n"

    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    body = row("th", [html.escape(x) for x in table.header])
    for number, cells in enumerate(table.rows, 1):
        contents = [
            _img(x, f"{name}, row {number}") if isinstance(x, bytes) else html.escape(x)
            for name, x in zip(table.header, cells, strict=True)
        ]
        body += row("td", contents)
    return f"<table>{caption}{body}</table>\n"


def _image_html(png: bytes, alt: str, caption: str) -> str:
    return f"<figure>{_img(png, alt)}<figcaption>{html.escape(caption)}</figcaption></figure>\n"


def _img(png: bytes, alt: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img alt="{html.escape(alt)}" src="{source}">'


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #22252a; --faint: #676d76; --line: #dcdfe4 }
@media (prefers-color-scheme: dark) { img { filter: brightness(.9) }
  :root { --paper: #17191d; --ink: #e2e4e8; --faint: #9aa0aa; --line: #363a42 } }
body { margin: 0 auto; padding: 1.5rem; max-width: 96rem; font: 1rem/1.5 system-ui, sans-serif;
  background: var(--paper); color: var(--ink) } h1, h2 { margin: 0 0 .6rem; line-height: 1.2 }
h2 { font-size: 1.25rem } ul { list-style: none; margin: 0; padding: 0 } figure { margin: 1rem 0 }
a { color: inherit; text-decoration: none } img { max-width: 100%; background: #fff }
nav, small, figcaption, caption, summary { font-size: .9rem; color: var(--faint) }
section { border-top: 1px solid var(--line); padding: 1.5rem 0 } span { margin-right: 1.4rem }
table { border-collapse: collapse; display: block; overflow-x: auto; text-align: left }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line) }
td img { height: 4rem; max-width: none; vertical-align: middle }
caption { text-align: left; white-space: nowrap } details table { font: .82rem monospace }
@media (min-width: 70rem) { body { display: grid; grid-template-columns: 14rem 1fr; gap: 0 2rem }
  main { min-width: 0 } nav { position: sticky; top: 1rem; max-height: 96vh; overflow: auto } }"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head>
<body><nav><ul>{contents}</ul></nav><main><h1>{title}</h1>{body}</main></body></html>
"""
