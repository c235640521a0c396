"""Position tables resized to another grid of patches."""

import numpy as np
import pytest

from m2mkd_jax.models.positions import resize_positions, resize_weights


def test_resizing_to_the_same_grid_is_identity():
    table = np.random.default_rng(0).standard_normal((1, 26, 4)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(table, 26), table)
    np.testing.assert_array_equal(resize_weights(5, 5), np.eye(5))


def test_resize_weights_by_hand():
    # Half a place from the centre, a tap weighs 0.59375; one and a half away, -0.09375. Taps
    # outside the grid count towards the border. There is no antialiasing.
    halved = [[0.5, 0.59375, -0.09375, 0], [0, -0.09375, 0.59375, 0.5]]
    np.testing.assert_allclose(resize_weights(4, 2), halved, rtol=1e-12)
    # Doubled, new places lie a quarter or three quarters between old ones.
    doubled = [[1.10546875, -0.10546875], [0.7734375, 0.2265625]]
    np.testing.assert_allclose(resize_weights(2, 4)[:2], doubled, rtol=1e-12)
    np.testing.assert_allclose(resize_weights(2, 4)[2:], np.flip(doubled), rtol=1e-12)


def test_resizing_keeps_rows_and_columns():
    table = np.zeros((1, 17, 2), np.float32)
    table[0, 1:5, 0] = 1  # the first row of four
    table[0, 4::4, 1] = 1  # the last column
    grid = resize_positions(table, 5)[0, 1:].reshape(2, 2, 2)
    assert grid.dtype == np.float32
    np.testing.assert_allclose(grid[..., 0], [[0.5, 0.5], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(grid[..., 1], [[0, 0.5], [0, 0.5]], atol=1e-6)


def test_resizing_keeps_class_token_and_constants():
    table = np.full((1, 17, 2), 3.0)
    table[0, 0] = 7
    for side in (3, 6):
        resized = resize_positions(table, side**2 + 1)
        np.testing.assert_array_equal(resized[0, 0], 7)
        np.testing.assert_allclose(resized[0, 1:], 3)
    with pytest.raises(ValueError, match="not a square grid"):
        resize_positions(table, 13)
