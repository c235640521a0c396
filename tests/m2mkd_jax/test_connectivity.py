"""Pictures of connectivity: that they are written, and what is drawn in them."""

import numpy as np
import pytest
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
def test_a_picture_of_any_size(nodes, tmp_path):
    before, after = RNG.normal(size=(2, nodes, 8)).astype(np.float32)
    pixels = draw(before, after, np.arange(nodes) % 4, tmp_path / "connectivity.png")
    assert pixels.shape[0] > 800 and pixels.shape[1] > 800
    assert pixels.std() > 10


def test_no_edges_and_all_edges_can_be_drawn(tmp_path):
    none, every = np.eye(9, dtype=np.float32), np.ones((9, 9), np.float32)
    pixels = draw(none, every, np.zeros(9, int), tmp_path / "connectivity.png")
    graphs = pixels[pixels.shape[0] // 2 :]
    before, after = np.array_split(np.all(graphs < 250, axis=-1), 2, axis=1)
    assert after.sum() > 2 * before.sum() > 0


def test_the_order_of_the_mediators_does_not_matter(tmp_path):
    # Each community is one point, so sorting by community puts all back in place.
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


def test_every_mediator_s_nearest_come_first():
    # Of two tight groups and a lone node, the lone one keeps an edge among the first few.
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


def test_nodes_without_edges_stand_around_the_others():
    edges = np.array([[0, 1], [1, 2], [0, 2]])
    places = connectivity._lay_out(6, edges)
    assert np.isfinite(places).all()
    radius = np.linalg.norm(places, axis=1)
    assert radius[3:].min() > radius[:3].max()
