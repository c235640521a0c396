"""What a loaded network accepts, and what it says about anything else."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from m2mkd_jax.loading import check_images, check_tokens

SHAPE = (8, 8, 3)
BYTES = np.full((2, *SHAPE), 200, np.uint8)


@pytest.mark.parametrize(
    "images",
    [
        BYTES,
        BYTES.astype(np.float32),
        jnp.asarray(BYTES),
        jnp.asarray(BYTES, jnp.bfloat16),
        BYTES.astype(np.int64),
        np.zeros((2, *SHAPE), np.float32),
        np.ones((2, *SHAPE), np.int64),
        np.linspace(0, 255, 2 * 8 * 8 * 3).reshape(2, *SHAPE),
        BYTES[:0],
    ],
)
def test_pixel_batches_are_accepted(images):
    assert check_images(images, SHAPE) is None


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (BYTES[0], r"shape \(8, 8, 3\), expected \(B, 8, 8, 3\): a single image .* x\[None\]"),
        (np.moveaxis(BYTES, -1, 1), r"shape \(2, 3, 8, 8\), expected \(B, 8, 8, 3\): channels"),
        (BYTES[:, :4], r"shape \(2, 4, 8, 3\), expected \(B, 8, 8, 3\): resize"),
        (BYTES[..., :1], r"shape \(2, 8, 8, 1\), expected .* images of rows, columns and channels"),
        (BYTES[None], r"shape \(1, 2, 8, 8, 3\), expected"),
        (np.uint8(3), r"shape \(\), expected"),
        (BYTES.tolist(), "images must be an array, not a list"),
        (BYTES > 3, "dtype bool, but must be real numbers"),
        (BYTES.astype(complex), "dtype complex128, but must be real numbers"),
        (BYTES.astype("S1"), "must be real numbers"),
        (BYTES / 255, r"from 0.784314 to 0.784314, but must be from 0 to 255: give 255 \* x"),
        (BYTES.astype(np.float32) - 300, "from -100 to -100, but must be .* and not norm"),
        (BYTES + 55.5, "from 255.5 to 255.5, but must be from 0 to 255"),
        (BYTES - 200.5, "from -0.5 to -0.5, but must be from 0 to 255"),
        (BYTES / 200, r"from 1 to 1, but must be from 0 to 255: give 255 \* x"),
        (BYTES.astype(np.int64) + 100, "from 300 to 300, but must be from 0 to 255"),
        (BYTES * np.float32("nan"), "from nan to nan, but must be"),
    ],
)
def test_wrong_images_are_refused_with_the_expected_shape(images, said):
    with pytest.raises(ValueError, match=said):
        check_images(images, SHAPE)


def test_concrete_images_are_checked_during_tracing():
    """A jitted function may close over its images, for example to take gradients by parameters."""

    def checked(images):
        return jax.jit(lambda scale: check_images(images, SHAPE) or scale)(1.0)

    assert checked(jnp.asarray(BYTES, jnp.float32)) == 1
    with pytest.raises(ValueError, match=r"from 0.784314 to 0.784314, but must be from 0 to 255"):
        checked(jnp.asarray(BYTES, jnp.float32) / 255)


def test_shapes_are_checked_during_tracing():
    @jax.jit
    def call(x):
        check_images(x, SHAPE)
        return x

    call(jnp.asarray(BYTES, jnp.float32) / 255)  # traced, so that no pixel is known
    with pytest.raises(ValueError, match="single image"):
        call(BYTES[0])


def test_tokens_of_another_stage_are_refused():
    x = np.zeros((2, 5, 16), np.float32)
    assert check_tokens(x, (5, 16)) is x
    with pytest.raises(ValueError, match=r"shape \(2, 5, 16\), expected \(B, 5, 32\)"):
        check_tokens(x, (5, 32))
    with pytest.raises(ValueError, match=r"shape \(5, 16\), expected \(B, 5, 16\)"):
        check_tokens(x[0], (5, 16))
