"""Augmentation on the device: what moves, what is erased, and what stays exactly the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import correlation, keys_drawn_from

from m2mkd_jax.data import augment
from m2mkd_jax.data.augment import AugmentConfig

KEY = jax.random.key(0)
PIXELS = jnp.asarray(np.random.default_rng(0).integers(1, 256, (8, 12, 10, 3)), jnp.uint8)
IMAGES = PIXELS.astype(jnp.float32) / 128 - 1
GREY = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def same(left, right):
    np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 0}, r"^repeats=0"),
        ({"padding": -1}, r"^padding=-1"),
        ({"switch": 1.5}, r"^switch=1.5"),
        ({"smoothing": 1.0}, r"^smoothing=1.0"),
        ({"magnitude": 11.0}, r"^magnitude=11.0"),
    ],
)
def test_invalid_config_names_its_key(settings, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**settings)


def test_defaults_only_normalise():
    got = augment.augment(PIXELS, KEY, config=AugmentConfig(), **GREY)
    np.testing.assert_allclose(got, (np.asarray(PIXELS) / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)


def test_augment_jits_and_depends_on_key():
    config = AugmentConfig(padding=2, flip=True, erasing=0.5, rotate=10.0, scale=0.1, shift=1.0)
    step = jax.jit(lambda images, key: augment.augment(images, key, config=config, **GREY))
    first = step(PIXELS, KEY)
    assert first.shape == PIXELS.shape and first.dtype == jnp.float32
    same(first, step(PIXELS, KEY))
    assert (np.asarray(first) != np.asarray(step(PIXELS, jax.random.key(1)))).any()


def test_normalise_is_per_channel():
    pixels = jnp.asarray([[[[0, 51, 255]]]], jnp.uint8)
    got = augment.normalise(pixels, mean=(0.5, 0.1, 0.25), std=(0.5, 0.2, 0.125))
    np.testing.assert_allclose(got, [[[[-1, 0.5, 6]]]], rtol=1e-5)


@pytest.mark.parametrize(
    "setting", [{"padding": 2}, {"flip": True}, {"erasing": 1.0}, {"rotate": 20.0}]
)
def test_augmentations_differ_by_image_and_key(setting):
    images = jnp.tile(PIXELS[:1, :6, :6, :1], (16, 1, 1, 1))
    mean_and_std = {"mean": (0.5,), "std": (0.25,)}
    config = AugmentConfig(**setting)
    run = jax.jit(lambda key: augment.augment(images, key, config=config, **mean_and_std))
    first, other = np.asarray(run(KEY)), np.asarray(run(jax.random.key(1)))
    assert len({image.tobytes() for image in first}) > 1
    assert (first != other).any()


@pytest.mark.parametrize("setting", [{"rotate": 20.0}, {"scale": 0.3}, {"shift": 1.5}])
def test_each_affine_setting_counts_as_movement(setting):
    assert AugmentConfig(**setting).moves and not AugmentConfig().moves


def test_augment_steps_run_in_order_with_their_settings(monkeypatch):
    asked = []

    def watch(name):
        def step(images, key, **settings):
            asked.append((name, settings))
            return images

        monkeypatch.setattr(augment, name, step)

    for name in ("flip", "pad_and_crop", "random_affine", "random_erasing"):
        watch(name)
    moves = {"rotate": 9.0, "scale": 0.1, "shift": 2.0}
    config = AugmentConfig(padding=3, flip=True, erasing=0.4, **moves)
    augment.augment(PIXELS, KEY, config=config, **GREY)
    assert asked == [
        ("random_affine", {"degrees": 9.0, "scale": 0.1, "shift": 2.0}),
        ("pad_and_crop", {"padding": 3}),
        ("flip", {}),
        ("random_erasing", {"probability": 0.4}),
    ]


def test_no_two_draws_share_a_key(monkeypatch):
    images = PIXELS[:2, :4, :4]
    moves = {"rotate": 9.0, "scale": 0.1, "shift": 1.0}
    config = AugmentConfig(padding=1, flip=True, erasing=0.5, **moves)
    run = functools.partial(augment.augment, images, config=config, **GREY)
    keys = keys_drawn_from(monkeypatch, run)
    assert len(keys) == 8 == len(set(keys))  # one each to move, crop and flip; five to erase


def test_geometry_precedes_and_erasing_follows_normalisation():
    """Black pixels that move in are normalised with the rest; noise is not normalised again."""
    config = AugmentConfig(padding=2, flip=True, erasing=0.5)
    images = jnp.full((400, 8, 8, 1), 255, jnp.uint8)
    run = jax.jit(lambda key: augment.augment(images, key, config=config, mean=(0.5,), std=(0.01,)))
    values = np.asarray(run(KEY))
    assert values.min() == pytest.approx(-50) and values.max() == pytest.approx(50)
    noise = values[np.abs(values) < 49]
    assert abs(noise.std() - 1) < 0.1 and noise.size > 1000


def test_geometry_is_on_host_for_large_images_and_randaugment():
    assert augment.geometry_on_device(AugmentConfig(), 32)
    assert not augment.geometry_on_device(AugmentConfig(), 33)
    config = AugmentConfig(padding=2, flip=True, randaugment=True, shift=2.0)
    got = augment.augment(PIXELS, KEY, config=config, **GREY)
    same(got, augment.normalise(PIXELS, **GREY))


def test_padded_crops_are_windows_of_the_padded_image():
    crops = np.asarray(augment.pad_and_crop(PIXELS, KEY, padding=2))
    padded = np.pad(np.asarray(PIXELS), ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = []
    for crop, image in zip(crops, padded, strict=True):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if (image[top : top + 12, left : left + 10] == crop).all()
        ]
        assert len(found) == 1
        corners += found
    assert len(set(corners)) > 3 and crops.dtype == np.uint8


def test_padded_crop_offsets_are_uniform():
    one = PIXELS[0, :5, :4]
    padded = np.pad(np.asarray(one), ((2, 2), (2, 2), (0, 0)))
    windows = np.stack(
        [padded[top : top + 5, left : left + 4] for top in range(5) for left in range(5)]
    )
    crops = np.asarray(augment.pad_and_crop(jnp.tile(one, (1000, 1, 1, 1)), KEY, padding=2))
    hits = (crops[:, None] == windows).all(axis=(2, 3, 4))
    assert (hits.sum(axis=1) == 1).all()
    counts = hits.sum(axis=0)  # 40 each, with a standard deviation of 6.2
    assert counts.min() > 15 and counts.max() < 65


def test_flip_mirrors_about_half():
    images = jnp.tile(PIXELS, (64, 1, 1, 1))
    flipped = np.asarray(augment.flip(images, KEY))
    kept = (flipped == np.asarray(images)).all(axis=(1, 2, 3))
    mirrored = (flipped == np.asarray(images)[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept ^ mirrored).all() and 0.4 < mirrored.mean() < 0.6


@pytest.mark.parametrize("images", [PIXELS, IMAGES])
def test_random_affine_with_zero_ranges_is_identity(images):
    still = augment.random_affine(images, KEY, degrees=0.0, scale=0.0, shift=0.0)
    same(still, images)
    assert still.dtype == images.dtype


def test_affine_shifts_rotates_and_scales():
    def move(images, *, angle=0.0, size=1.0, shift=(0.0, 0.0)):
        count = len(images)
        return np.asarray(
            augment.affine(
                images,
                angle=jnp.full(count, angle),
                size=jnp.full(count, size),
                shift=jnp.tile(jnp.asarray(shift), (count, 1)),
            )
        )

    square = PIXELS[:, :9, :9]
    pixels = np.asarray(square)
    shifted = move(square, shift=(2.0, -1.0))  # two rows down, one column left
    same(shifted[:, 2:, :-1], pixels[:, :-2, 1:])
    assert (shifted[:, :2] == 0).all() and (shifted[:, :, -1] == 0).all()
    same(move(square, angle=np.pi / 2), np.rot90(pixels, axes=(1, 2)))
    twice = move(square, size=2.0)
    same(twice[:, ::2, ::2], pixels[:, 2:7, 2:7])
    half = move(IMAGES, shift=(0.5, 0.0))
    middle = np.asarray(IMAGES[:, :-1] + IMAGES[:, 1:]) / 2
    np.testing.assert_allclose(half[:, 1:], middle, atol=1e-5)


def test_affine_rounds_integer_pixels():
    column = jnp.asarray([[[0], [10], [13]]], jnp.uint8)[..., None]
    still = {"angle": jnp.zeros(1), "size": jnp.ones(1)}
    for down, want in ((0.75, [0, 2, 11]), (0.25, [0, 8, 12])):
        moved = augment.affine(column, shift=jnp.asarray([[down, 0.0]]), **still)
        np.testing.assert_array_equal(np.ravel(moved), want)  # 0, 2.5, 10.75; 0, 7.5, 12.25


# A pixel of these images encodes its own position, which bilinear interpolation preserves exactly.
PLACES = jnp.stack(jnp.meshgrid(jnp.arange(9.0), jnp.arange(9.0), indexing="ij"), axis=-1)


def movement(moved):
    """(angle, size, down, right), each [B], of the transform that made `moved` from PLACES."""
    moved = np.asarray(moved, float)
    source = moved[:, 4, 4] - 4
    to_row = np.stack(
        [moved[:, 5, 4, 0] - moved[:, 4, 4, 0], moved[:, 4, 5, 0] - moved[:, 4, 4, 0]]
    )
    cosine, sine = to_row
    down = -(cosine * source[:, 0] - sine * source[:, 1]) / (cosine**2 + sine**2)
    right = -(sine * source[:, 0] + cosine * source[:, 1]) / (cosine**2 + sine**2)
    return np.arctan2(sine, cosine), 1 / np.hypot(cosine, sine), down, right


def test_affine_parameters_are_per_image():
    angle, size = np.array([0.1, -0.2, 0.3]), np.array([1.0, 1.1, 0.9])
    shift = np.array([[1.0, -0.5], [0.0, 0.25], [0.5, 1.0]])
    moved = augment.affine(
        jnp.tile(PLACES, (3, 1, 1, 1)),
        angle=jnp.asarray(angle, jnp.float32),
        size=jnp.asarray(size, jnp.float32),
        shift=jnp.asarray(shift, jnp.float32),
    )
    np.testing.assert_allclose(movement(moved), [angle, size, *shift.T], atol=1e-5)


def test_random_affine_draws_are_uniform_and_independent():
    images = jnp.tile(PLACES, (2000, 1, 1, 1))
    run = jax.jit(lambda key: augment.random_affine(images, key, degrees=9.0, scale=0.2, shift=1.5))
    angle, size, down, right = movement(run(KEY))
    assert correlation(angle, size, down, right) < 0.08
    for draws, end in ((np.degrees(angle), 9.0), (size - 1, 0.2), (down, 1.5), (right, 1.5)):
        share = draws / end
        assert -1.001 < share.min() < -0.99 and 0.99 < share.max() < 1.001
        assert abs(share.mean()) < 0.05 and abs(share.std() - 3**-0.5) < 0.02  # uniform


def test_random_erasing_fills_one_rectangle_with_noise():
    images = jnp.full((400, 24, 20, 3), 100.0)
    erased = np.asarray(augment.random_erasing(images, KEY, probability=0.25))
    touched = (erased != 100).any(axis=-1)
    hit = touched.any(axis=(1, 2))
    assert 0.18 < hit.mean() < 0.32
    for mask in touched[hit]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        tall, wide = len(rows), len(columns)
        assert mask.sum() == tall * wide  # a full rectangle,
        assert rows[-1] - rows[0] + 1 == tall < 24 and columns[-1] - columns[0] + 1 == wide < 20
        assert 0.01 < tall * wide / 480 < 0.38
    noise = erased[touched]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert len(np.unique(noise)) > 0.99 * noise.size  # noise differs per pixel, channel and image
    same(augment.random_erasing(images, KEY, probability=0.0), images)


def rectangles(images):
    """(which images, top, left, height, width) of the regions that differ from 100."""
    touched = (np.asarray(images) != 100).any(axis=-1)
    hit = touched.any(axis=(1, 2))
    rows, columns = touched[hit].any(axis=2), touched[hit].any(axis=1)
    top, left = rows.argmax(axis=1), columns.argmax(axis=1)
    return hit, top, left, rows.sum(axis=1), columns.sum(axis=1)


def test_erased_rectangles_cover_range_of_area_aspect_and_position():
    side = 48
    images = jnp.full((2000, side, side, 1), 100.0)
    run = jax.jit(lambda key: augment.random_erasing(images, key, probability=0.5))
    hit, top, left, tall, wide = rectangles(run(KEY))
    assert abs(hit.mean() - 0.5) < 0.03
    area, log_aspect = tall * wide / side**2, np.log(tall / wide)
    assert 0.017 < area.min() < 0.024 and 0.32 < area.max() < 0.345
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.01  # few do not fit
    low, high = np.log(0.3), np.log(1 / 0.3)
    assert low - 0.15 < log_aspect.min() < low + 0.05
    assert high - 0.05 < log_aspect.max() < high + 0.15
    assert abs(log_aspect.mean()) < 0.05 and abs(log_aspect.std() - high / 3**0.5) < 0.06
    assert top.min() == left.min() == 0
    assert (top + tall).max() == (left + wide).max() == side
    down, right = top / (side - tall), left / (side - wide)
    assert abs(down.mean() - 0.5) < 0.03 and abs(right.mean() - 0.5) < 0.03
    assert correlation(area, log_aspect, down, right) < 0.15


def sides_by_trying(rng, height, width):
    """(height, width) of the first of ten tries that fits."""
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        tall, wide = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if tall < height and wide < width:
            return tall, wide
    return None


def test_random_erasing_takes_first_fitting_try_of_ten():
    """In this strip, every other try is too tall."""
    images = jnp.full((1600, 12, 64, 1), 100.0)
    run = jax.jit(lambda key: augment.random_erasing(images, key, probability=1.0))
    hit, _, _, tall, wide = rectangles(run(KEY))
    assert hit.mean() > 0.99 and tall.max() == 11
    rng = np.random.default_rng(0)
    naive = np.array([x for _ in range(8000) if (x := sides_by_trying(rng, 12, 64))]).T
    for found, want in zip((tall, wide), naive, strict=True):
        assert abs(np.log(found).mean() - np.log(want).mean()) < 0.03
    assert abs(np.corrcoef(tall, wide)[0, 1] - np.corrcoef(*naive)[0, 1]) < 0.06
