"""Plots of runs: a run's panels, and curves of several runs in one plot.

Matplotlib takes long to import, so programs import this module only when they draw.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from io import BytesIO

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common_jax.report.gather import Curves, Family, HeatMap, Panels
from common_jax.report.pictures import DRAWN, fingerprint
from common_jax.workdir import write_bytes

CurveGroups = Mapping[str, Sequence[Sequence[tuple[int, float]]]]

# Okabe and Ito's colours, which colour-blind readers can tell apart, without their yellow, which is
# hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK = "#333333"
DPI, SLOT, TOP, BOTTOM = 110, 5.6, 0.42, 0.55  # the last three in inches: a panel and its margins
NAME, LETTER = 0.22, 0.07  # inches: the height of a curve's name or a band, and a letter's width


def overlay(curves: CurveGroups, *, label: str, path: epath.PathLike) -> None:
    """Writes a PNG that compares groups of curves: thin lines for a group's curves, a bold line for
    their mean at the steps that all of them have, and a band from minimum to maximum there.

    Args:
      curves: group -> its curves, such as one per seed, each a sequence of (step, value).
      label: label of the values, with their unit.
      path: the file to write.

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


def draw_panels(panels: Panels) -> bytes:
    """A PNG of a run's panels, two per row, with their fingerprint for `read_drawn`."""
    # Laid out here, in inches, because matplotlib's layout engines draw everything twice.
    rows = []
    for _, group in itertools.groupby(panels, lambda panel: panel.height):
        members = list(group)
        rows += [members[i : i + 2] for i in range(0, len(members), 2)]
    heights = [max(row[0].height, *(NAME * len(panels[x]) for x in row)) for row in rows]
    y = total = sum(heights) + (TOP + BOTTOM) * len(rows)
    figure = Figure(figsize=(2 * SLOT, total), dpi=DPI)
    for row, height in zip(rows, heights, strict=True):
        y -= TOP + height
        for place, panel in enumerate(row):
            curves, heat = panels[panel], isinstance(panel, HeatMap)
            names = LETTER * max(map(len, curves))
            left, right = (names + 0.3, 0.25) if heat else (0.75, names + 0.5)
            x, width = (place * SLOT + left) / (2 * SLOT), (SLOT - left - right) / (2 * SLOT)
            axes = figure.add_axes((x, y / total, width, height / total))
            (_draw_shares if heat else _draw_curves)(axes, panel, curves)
            axes.set_title(_plain(panel.title), size=10, weight="bold", loc="left", y=1.04)
        y -= BOTTOM
    about = PngInfo()
    about.add_text(DRAWN, fingerprint(panels))
    return _png(figure, about)


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


def _draw_shares(axes: Axes, panel: HeatMap, curves: Curves) -> None:
    """Draws one band per list, coloured by share over the fair share. At the end of training: one
    column per item. Over time: one row per item, and one column per log line, at most 400."""
    norm, item = LogNorm(1 / 4, 4), panel.shares.item
    for row, lists in enumerate(curves.values()):
        shares = np.array(list(lists.values()), float)
        count = shares.shape[1]
        x, y, cells = np.arange(count + 1) - 0.5, (row - 0.5, row + 0.5), shares[-1:]
        if panel.over_time:
            every = math.ceil(len(lists) / 400)
            steps = list(lists)[::every]
            x = [2 * steps[0] - (steps[1] if len(steps) > 1 else steps[0] + 1), *steps]
            y, cells = np.linspace(row - 0.5, row + 0.5, count + 1), shares[::every].T
        elif count <= 16:
            for number, percent in enumerate(100 * shares[-1]):
                ink = INK if 40 < percent * count < 250 else "white"
                text = axes.text(number, row, f"{percent:.0f}", color=ink, size=8, ha="center")
                text.set_verticalalignment("center")
        cells = np.clip(cells * count, norm.vmin, norm.vmax)
        image = axes.pcolorfast(x, y, cells, cmap="RdBu_r", norm=norm)
        axes.axhline(row - 0.5, color=INK, linewidth=0.8)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_ticks((1 / 4, 1 / 2, 1, 2, 4), labels=("≤ ¼", "½", "1", "2", "≥ 4"), size=8, color=INK)
    bar.minorticks_off()
    bar.set_label("share / fair share", size=8, color=INK)
    _finish(axes, ylabel="")
    axes.set_xlabel(f"step (a line per {item})" if panel.over_time else item, size=8, color=INK)
    axes.set_yticks(range(len(curves)), [_plain(name) for name in curves])
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
    # With fixed positions, matplotlib does not measure the whole panel to find them.
    axes.xaxis.set_label_coords(0.5, -33 / axes.bbox.height)
    axes.yaxis.set_label_coords(-58 / axes.bbox.width, 0.5)


def _plain(text: str) -> str:
    """Escapes text so that matplotlib does not render it as mathematics."""
    return text.replace("$", r"\$")


def _png(figure: Figure, about: PngInfo | None = None) -> bytes:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    file = BytesIO()
    # With a palette, the file is a third of the size and faster to compress.
    small = image.quantize(200, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    small.save(file, "png", pnginfo=about)
    return file.getvalue()
