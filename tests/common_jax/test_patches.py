"""Patch tokens of images."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from common_jax.nn.patches import PatchEmbedding


def test_patches_and_their_pixels_are_in_raster_order():
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    layer = PatchEmbedding(2, 12, jnp.float32)
    # Each token is its patch, reversed.
    params = {"kernel": np.eye(12)[::-1], "bias": np.arange(12.0)}
    tokens = layer.apply({"params": params}, jnp.asarray(images))
    assert tokens.shape == (2, 6, 12)
    for t, (i, j) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        patch = images[:, i : i + 2, j : j + 2].reshape(2, 12)
        np.testing.assert_allclose(tokens[:, t], patch[:, ::-1] + np.arange(12), rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_indivisible_images_are_refused(shape):
    with pytest.raises(ValueError, match="do not split into patches of 4 x 4"):
        PatchEmbedding(4, 5, jnp.float32).init(jax.random.key(0), jnp.ones((1, *shape, 3)))
