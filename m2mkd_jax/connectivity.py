"""Plots of the connections between a NAC's mediators, before and after training."""

from io import BytesIO

import matplotlib
import networkx as nx
import numpy as np
from etils import epath
from jax import numpy as jnp
from jaxtyping import Array, Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from common_jax.report.draw import DPI, INK
from common_jax.workdir import write_bytes
from m2mkd_jax.nac.kernel import cosine_distance

MOST_EDGES = 2000  # per plot of a graph; with more it is a black disc
MOST_BORDERS = 32  # lines between communities; more would hide the matrix
EDGE = "#555555"


def draw_connectivity(
    signatures_before: Float[Array | np.ndarray, "T Y"],
    signatures_after: Float[Array | np.ndarray, "T Y"],
    communities: Int[np.ndarray, " T"],
    *,
    truncation: float,
    path: epath.PathLike,
) -> None:
    """Writes a PNG of the mediators' distances and graphs: left before training, right after.

    The upper row shows the distances, sorted by community; the lower row shows the graph that
    connects mediators within `truncation`. Both sides share the colours and the graph layout from
    before training. At most MOST_EDGES edges are drawn, nearest neighbours first; the title says if
    there are more.

    Args:
      signatures_before, signatures_after: signatures of the same mediators.
      communities: community of each mediator, by which the matrices are sorted.
      truncation: distance up to which two mediators are connected.
      path: path of the PNG.
    """
    order = np.argsort(communities, kind="stable")
    groups = np.asarray(communities)[order]
    sides = {"before training": signatures_before, "after training": signatures_after}
    distances = {}
    for name, signatures in sides.items():
        sorted_signatures = jnp.asarray(signatures, jnp.float32)[order]
        distances[name] = np.asarray(cosine_distance(sorted_signatures, sorted_signatures))
    farthest = max(truncation + 0.1, *(d.max() for d in distances.values()))
    norm = TwoSlopeNorm(truncation, 0, farthest)
    edges = {name: _edges(d, truncation) for name, d in distances.items()}
    places = _lay_out(len(order), edges["before training"][:MOST_EDGES])
    figure = Figure(figsize=(10, 9.6), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, 2)
    for column, name in enumerate(sides):
        image = _draw_distances(axes[0, column], distances[name], groups, norm)
        axes[0, column].set_title(f"Distances {name}", size=11, weight="bold", loc="left")
        _draw_graph(axes[1, column], edges[name], groups, places)
        axes[1, column].set_title(_caption(name, edges[name], len(order)), size=10, loc="left")
    bar = figure.colorbar(image, ax=axes[0], shrink=0.9, pad=0.02)
    bar.set_label(f"cosine distance; red: connected (up to {truncation:g})", color=INK)
    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    write_bytes(path, file.getvalue())


def _edges(distance: np.ndarray, truncation: float) -> np.ndarray:
    """Pairs (edges, 2) within `truncation`: first each mediator's nearest neighbour, then its
    second nearest, and so on."""
    # The argsort of an argsort ranks each mediator among the neighbours of every other.
    rank = np.argsort(np.argsort(distance, axis=1, kind="stable"), axis=1)
    first, second = np.nonzero(np.triu(distance <= truncation, 1))
    place = np.minimum(rank[first, second], rank[second, first])
    order = np.lexsort((distance[first, second], place))
    return np.stack([first[order], second[order]], axis=1)


def _caption(name: str, edges: np.ndarray, nodes: int) -> str:
    share = len(edges) / max(1, nodes * (nodes - 1) // 2)
    text = f"{len(edges):,} edges {name} ({share:.1%} of pairs)"
    if len(edges) > MOST_EDGES:
        text += f",\n{MOST_EDGES:,} of them drawn, nearest neighbours first"
    return text


def _lay_out(nodes: int, edges: np.ndarray) -> np.ndarray:
    """Positions (nodes, 2) from -1 to 1: a spring layout of the nodes with edges, inside a circle
    of the isolated nodes."""
    places = np.zeros((nodes, 2))
    connected = np.unique(edges)
    isolated = np.setdiff1d(np.arange(nodes), connected)
    angles = 2 * np.pi * np.arange(len(isolated)) / max(1, len(isolated))
    places[isolated] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if len(connected):
        graph = nx.Graph()
        graph.add_nodes_from(connected.tolist())
        graph.add_edges_from(edges.tolist())
        reach = 0.85 if len(isolated) else 1.0
        layout = nx.spring_layout(graph, seed=0, scale=reach)
        places[connected] = np.array([layout[node] for node in connected.tolist()])
    return places


def _draw_distances(
    axes: Axes, distance: np.ndarray, groups: np.ndarray, norm: TwoSlopeNorm
) -> matplotlib.image.AxesImage:
    image = axes.imshow(distance, cmap="RdBu", norm=norm, interpolation="nearest")
    borders = np.flatnonzero(np.diff(groups)) + 0.5
    if len(borders) <= MOST_BORDERS:
        for border in borders:
            axes.axhline(border, color=INK, linewidth=0.5)
            axes.axvline(border, color=INK, linewidth=0.5)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.set_xlabel("mediator, by community of the prior", size=8, color=INK)
    return image


def _draw_graph(axes: Axes, edges: np.ndarray, groups: np.ndarray, places: np.ndarray) -> None:
    edges = edges[:MOST_EDGES]
    # The more edges there are, the fainter each is drawn.
    fade = np.clip(60 / max(1, len(edges)) ** 0.7, 0.1, 0.6)
    axes.add_collection(LineCollection(places[edges], colors=EDGE, linewidths=0.6, alpha=fade))
    count = groups.max() + 1
    colours = matplotlib.colormaps["tab20" if count <= 20 else "gist_rainbow"]
    # tab20 is indexed by integers, a continuous colormap by numbers from 0 to 1.
    values = groups if count <= 20 else groups / (count - 1)
    size = np.clip(5000 / len(groups), 10, 120)
    axes.scatter(*places.T, s=size, c=colours(values), linewidths=0.4, edgecolors="white", zorder=2)
    axes.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), aspect="equal")
    axes.set_axis_off()
