"""Pictures of connectivity: that they are written, and what is drawn in them."""

import numpy as np
import pytest
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from PIL import Image

from m2mkd_jax import connectivity
from m2mkd_jax.connectivity import draw_connectivity

RNG = np.random.default_rng(0)


def circle(angles):
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def draw(before, after, communities, path, truncation=0.8):
    draw_connectivity(before, after, communities, truncation=truncation, path=path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), int)


@pytest.mark.parametrize("nodes", [8, 300])
def test_picture_of_few_or_many_nodes(nodes, tmp_path):
    before, after = RNG.normal(size=(2, nodes, 8)).astype(np.float32)
    pixels = draw(before, after, np.arange(nodes) % 4, tmp_path / "connectivity.png")
    assert pixels.shape[0] > 800 and pixels.shape[1] > 800
    assert pixels.std() > 10


def quarters(pixels):
    """Red minus blue, and the fraction of dark pixels, of the four pictures: (2, 2) each."""
    height, width = (size // 2 for size in pixels.shape[:2])
    parts = [
        [pixels[i * height : (i + 1) * height, j * width : (j + 1) * width] for j in range(2)]
        for i in range(2)
    ]
    red = [[np.mean(part[..., 0] - part[..., 2]) for part in row] for row in parts]
    dark = [[np.mean(part.max(axis=-1) < 200) for part in row] for row in parts]
    return np.asarray(red), np.asarray(dark)


def test_near_mediators_are_red_and_joined_in_their_own_panels(tmp_path):
    # All at distance 1, beyond the truncation, and all at distance 0.
    none, every = np.eye(9, dtype=np.float32), np.ones((9, 9), np.float32)
    red, dark = quarters(draw(none, every, np.zeros(9, int), tmp_path / "connectivity.png"))
    assert red[0, 0] < -10 and red[0, 1] > 10
    assert dark[1, 1] > 2 * dark[1, 0]


def test_picture_is_independent_of_mediator_order(tmp_path):
    # Each community is a single point, so sorting by community restores the order.
    communities = np.repeat(np.arange(3), 4)
    signatures = circle(communities * 2.0)
    shuffle = RNG.permutation(12)
    first = draw(signatures, signatures, communities, tmp_path / "a")
    again = draw(signatures[shuffle], signatures[shuffle], communities[shuffle], tmp_path / "b")
    np.testing.assert_array_equal(first, again)


def test_edges_are_the_pairs_within_the_truncation():
    angles = np.array([0, 0.5, 1.2, 3.0])
    distance = 1 - np.cos(angles[:, None] - angles)
    edges = connectivity._edges(distance, 1 - np.cos(0.9))
    assert {tuple(edge) for edge in edges.tolist()} == {(0, 1), (1, 2)}


def test_edges_to_nearest_mediators_come_first():
    # With two tight groups and a lone node, the lone one keeps an edge among the first few.
    points = np.concatenate([RNG.normal(0, 0.01, 20), RNG.normal(1, 0.01, 20), [2.0]])
    distance = np.abs(points[:, None] - points)
    edges = connectivity._edges(distance, 1.5)
    assert set(range(41)) == set(np.unique(edges[:41]))
    assert len(edges) == np.sum(np.triu(distance <= 1.5, 1))


def test_a_caption_says_when_edges_are_left_out():
    every = np.stack(np.triu_indices(100, 1), axis=1)
    assert "2,000 of them drawn" in connectivity._caption("before training", every, 100)
    few = connectivity._caption("before training", every[:10], 100)
    assert few == "10 edges before training (0.2% of pairs)"


def test_isolated_nodes_surround_the_others():
    edges = np.array([[0, 1], [1, 2], [0, 2]])
    places = connectivity._lay_out(6, edges)
    assert np.isfinite(places).all()
    radius = np.linalg.norm(places, axis=1)
    assert radius[3:].min() > radius[:3].max()


def test_edges_include_the_truncation_distance():
    distance = np.array([[0, 0.5, 0.75], [0.5, 0, 2.0], [0.75, 2.0, 0]])
    assert connectivity._edges(distance, 0.5).tolist() == [[0, 1]]
    assert connectivity._edges(distance, np.nextafter(0.5, 0)).tolist() == []
    assert connectivity._edges(distance, 0.75).tolist() == [[0, 1], [0, 2]]


def test_edge_order_by_hand():
    # On a line at 0, 1, 3, 7. Nearest: 0-1 (for both), 1-2 (for 2), 2-3 (for 3). Then the second
    # nearest: 0-2 (for 0) and 1-3 (for 3). Then 0-3, the third for both.
    places = np.array([0.0, 1.0, 3.0, 7.0])
    distance = np.abs(places[:, None] - places)
    want = [[0, 1], [1, 2], [2, 3], [0, 2], [1, 3], [0, 3]]
    assert connectivity._edges(distance, 9.0).tolist() == want


def axes_of(draw_on, *arguments):
    axes = Figure().subplots()
    draw_on(axes, *arguments)
    return axes


@pytest.mark.parametrize("communities", [1, 3, 20, 21, 40])
def test_communities_have_distinct_colours(communities):
    groups = np.arange(80) % communities
    places = RNG.normal(size=(80, 2))
    axes = axes_of(connectivity._draw_graph, np.zeros((0, 2), int), groups, places)
    axes.figure.canvas.draw()  # maps values to colours
    _, nodes = axes.collections
    colours = nodes.get_facecolors()
    assert len(colours) == 80
    seen = {tuple(colour) for colour in np.round(colours, 6).tolist()}
    assert len(seen) == communities
    by_group = {(g, tuple(c)) for g, c in zip(groups, np.round(colours, 6).tolist(), strict=True)}
    assert len(by_group) == communities
    np.testing.assert_allclose(nodes.get_offsets(), places)


def test_draw_graph_joins_nodes_by_the_first_edges():
    count = connectivity.MOST_EDGES
    edges = np.stack([np.arange(count + 5), np.arange(count + 5) + 1], axis=1)
    places = RNG.normal(size=(count + 6, 2))
    axes = axes_of(connectivity._draw_graph, edges, np.zeros(count + 6, int), places)
    segments = np.asarray(axes.collections[0].get_segments())
    np.testing.assert_allclose(segments, places[edges[:count]])


@pytest.mark.parametrize(("communities", "borders"), [(1, []), (3, [3.5, 7.5]), (40, None)])
def test_borders_separate_communities_if_there_are_few(communities, borders):
    groups = np.repeat(np.arange(communities), 4)
    distance = np.zeros((len(groups), len(groups)))
    axes = axes_of(connectivity._draw_distances, distance, groups, TwoSlopeNorm(0.5, 0, 1))
    across = [line.get_ydata()[0] for line in axes.lines[::2]]
    down = [line.get_xdata()[0] for line in axes.lines[1::2]]
    assert across == down == (borders or [])


def spied(monkeypatch):
    """The arguments of both kinds of pictures, before and after training; no file is written."""
    monkeypatch.setattr(connectivity.FigureCanvasAgg, "print_png", lambda self, file: None)
    given = {"_draw_distances": [], "_draw_graph": []}
    for name, calls in given.items():
        whole = getattr(connectivity, name)

        def spy(*arguments, whole=whole, calls=calls):
            calls.append(arguments[1:])
            return whole(*arguments)

        monkeypatch.setattr(connectivity, name, spy)
    return given


def test_before_and_after_share_order_colours_and_positions(monkeypatch, tmp_path):
    given, communities = spied(monkeypatch), np.array([1, 0, 1, 0, 2])
    before, after = circle(np.array([0.0, 2, 0.1, 2.2, 4])), circle(np.array([0.0, 1, 2, 3, 3.1]))
    draw_connectivity(before, after, communities, truncation=0.3, path=tmp_path / "c.png")
    order = [1, 3, 0, 2, 4]
    (first, groups, norm), (second, same_groups, same_norm) = given["_draw_distances"]
    np.testing.assert_array_equal(groups, [0, 0, 1, 1, 2])
    assert groups is same_groups and norm is same_norm
    for found, signatures in ((first, before), (second, after)):
        want = 1 - signatures[order] @ signatures[order].T
        np.testing.assert_allclose(found, want, atol=1e-5)
    assert norm.vcenter == 0.3 and norm.vmin == 0
    assert norm.vmax == pytest.approx(max(first.max(), second.max()))
    (edges, _, places), (later, _, same_places) = given["_draw_graph"]
    assert {tuple(edge) for edge in edges.tolist()} == {(0, 1), (2, 3)}
    assert {tuple(edge) for edge in later.tolist()} == {(1, 4)}
    assert places is same_places
    np.testing.assert_array_equal(places, connectivity._lay_out(5, edges))


def test_colour_range_extends_beyond_truncation(monkeypatch, tmp_path):
    given = spied(monkeypatch)
    same = np.ones((4, 3), np.float32)
    draw_connectivity(same, same, np.zeros(4, int), truncation=2.0, path=tmp_path / "c.png")
    assert given["_draw_distances"][0][2].vmax == pytest.approx(2.1)


def test_captions_count_pairs_once():
    edges = np.array([[0, 1], [0, 2]])
    assert connectivity._caption("after training", edges, 4) == (
        "2 edges after training (33.3% of pairs)"
    )
    assert connectivity._caption("after training", edges[:0], 1).startswith("0 edges")
    full = np.zeros((connectivity.MOST_EDGES, 2), int)
    assert "of them drawn" not in connectivity._caption("after training", full, 1000)
