"""CLIP's preprocessing compared with the original processor, and the range of augmentations."""

import dataclasses

import numpy as np
import pytest

from cliptrans_jax.data.pictures import AugmentConfig, augment_picture, prepare_picture
from cliptrans_jax.towers.tower import CLIP_PICTURES

STILL = AugmentConfig(
    shift=0.0, scale=0.0, rotate=0.0, brightness=0.0, contrast=0.0, saturation=0.0, flip=False
)


def random_image(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (32, 32), (31, 97), (20, 21), (333, 32)])
def test_preprocessing_matches_the_clip_processor(shape):
    module = pytest.importorskip(
        "transformers.models.clip.image_processing_pil_clip",
        reason="this transformers has no processor without torch",
    )
    processor = module.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    image = random_image(*shape)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    found = prepare_picture(image, 32)
    assert found.shape == (32, 32, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected.transpose(1, 2, 0), rtol=1e-6, atol=1e-6)


def test_square_image_of_the_right_size_is_only_normalised():
    image = random_image(16, 16)
    found = prepare_picture(image, 16) * CLIP_PICTURES.std + CLIP_PICTURES.mean
    np.testing.assert_allclose(found, image / 255, rtol=0, atol=1e-6)


def test_crop_is_central():
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = 255
    assert np.all(prepare_picture(image, 8) > 1.8)


def test_grey_and_transparent_images_are_accepted():
    grey = random_image(9, 9)[..., 0]
    np.testing.assert_array_equal(
        prepare_picture(grey, 9), prepare_picture(np.stack([grey] * 3, axis=-1), 9)
    )
    colour = random_image(9, 9)
    opaque = np.concatenate([colour, np.full((9, 9, 1), 255, np.uint8)], axis=-1)
    np.testing.assert_array_equal(prepare_picture(opaque, 9), prepare_picture(colour, 9))


@pytest.mark.parametrize(
    "image",
    [
        np.full((4, 4), 300, np.uint16),  # PIL would turn it white
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_pixels_of_the_wrong_dtype_or_shape_are_refused(image):
    with pytest.raises(ValueError, match=rf"a picture is {image.dtype} \(.*give uint8 .* of shape"):
        prepare_picture(image, 4)


def test_disabled_augmentation_changes_nothing():
    image = random_image(12, 17)
    found = augment_picture(image, STILL, np.random.default_rng(0))
    np.testing.assert_array_equal(found, image)


def test_augmentation_depends_only_on_the_generator():
    image = random_image(24, 24)
    one, same, other = (
        augment_picture(image, AugmentConfig(), np.random.default_rng(s)) for s in (1, 1, 2)
    )
    assert one.shape == image.shape and one.dtype == np.uint8
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_config_does_not_change_the_number_of_draws():
    after = []
    for config in (STILL, AugmentConfig(flip=True)):
        generator = np.random.default_rng(5)
        augment_picture(random_image(8, 8), config, generator)
        after.append(generator.random())
    assert after[0] == after[1]


def square(rows=21, columns=21, at=(8, 13)):
    image = np.full((rows, columns, 3), 255, np.uint8)
    image[at[0] - 1 : at[0] + 2, at[1] - 1 : at[1] + 2] = 0
    return image


def centre(image):
    """(row, column) of the centre of the dark pixels."""
    weight = 255.0 - image.mean(axis=-1)
    rows, columns = np.indices(weight.shape)
    return np.array([(weight * rows).sum(), (weight * columns).sum()]) / weight.sum()


def test_half_of_the_images_are_flipped():
    config = dataclasses.replace(STILL, flip=True)
    columns = [
        centre(augment_picture(square(), config, np.random.default_rng(seed)))[1]
        for seed in range(40)
    ]
    counts = {round(c): columns.count(c) for c in set(columns)}
    assert set(counts) == {13, 7} and min(counts.values()) >= 10


@pytest.mark.parametrize(
    ("fields", "reach"), [({"shift": 0.2}, 4.2), ({"rotate": 30.0}, 2.2), ({"scale": 0.3}, 1.6)]
)
def test_shifts_stay_within_the_configured_range(fields, reach):
    config = dataclasses.replace(STILL, **fields)
    moves = [
        centre(augment_picture(square(), config, np.random.default_rng(seed))) - (8, 13)
        for seed in range(40)
    ]
    largest = np.abs(moves).max()
    assert 0.5 * reach < largest < reach + 0.1
    corner = augment_picture(square(), config, np.random.default_rng(0))[0, 0]
    np.testing.assert_array_equal(corner, 255)  # what moves into view is white


def test_scaling_is_about_the_centre():
    config = dataclasses.replace(STILL, scale=0.3)
    for seed in range(10):
        moved = centre(augment_picture(square(at=(10, 10)), config, np.random.default_rng(seed)))
        np.testing.assert_allclose(moved, (10, 10), atol=0.1)


@pytest.mark.parametrize("key", ["brightness", "contrast", "saturation"])
def test_colour_augmentation_keeps_shapes(key):
    image = random_image(8, 8) // 2 + 60
    config = dataclasses.replace(STILL, **{key: 0.3})
    found = augment_picture(image, config, np.random.default_rng(3))
    assert not np.array_equal(found, image)
    assert np.corrcoef(found.ravel().astype(float), image.ravel().astype(float))[0, 1] > 0.9


def turned(image):
    """The angle in degrees of the dark pixels around the centre of a 21 x 21 picture."""
    rows, columns = centre(image) - 10
    return np.degrees(np.arctan2(rows, columns))


def measure(seed):
    """Each change on its own, as a fraction of the maximum that its config allows."""

    def change(image, **fields):
        config = dataclasses.replace(STILL, **fields)
        return augment_picture(image, config, np.random.default_rng(seed)).astype(float)

    at = square(15, 31, at=(7, 15))
    down, right = (centre(change(at, shift=0.2)) - (7, 15)) / (0.2 * 15, 0.2 * 31)
    aside = square(at=(10, 15))  # 5 columns from the centre
    scale = (centre(change(aside, scale=0.3))[1] - 10) / 5 - 1
    grey = np.full((4, 4, 3), 100, np.uint8)
    stripes = np.full((4, 4, 3), 60, np.uint8)
    stripes[::2] = 140
    reddish = np.full((4, 4, 3), 100, np.uint8)
    reddish[..., 0] = 160
    contrast, coloured = change(stripes, contrast=0.2), change(reddish, saturation=0.3)[0, 0]
    return {
        "down": down,
        "right": right,
        "scale": scale / 0.3,
        "turn": turned(change(aside, rotate=30.0)) / 30,
        "brightness": (change(grey, brightness=0.2).mean() / 100 - 1) / 0.2,
        "contrast": ((contrast.max() - contrast.min()) / 80 - 1) / 0.2,
        "saturation": ((coloured[0] - coloured[1]) / 60 - 1) / 0.3,
        "mirrored": np.sign(10 - centre(change(aside, flip=True))[1]),
    }


def test_augmentations_cover_their_range_independently():
    found = [measure(seed) for seed in range(150)]
    drawn = {name: np.array([one[name] for one in found]) for name in found[0]}
    for name, values in drawn.items():
        assert -1.1 < values.min() < -0.85 and 0.85 < values.max() < 1.1, name
        assert abs(values.mean()) < 0.25, name
    together = np.corrcoef(list(drawn.values()))[~np.eye(len(drawn), dtype=bool)]
    assert np.abs(together).max() < 0.35


def test_contrast_is_about_the_mean_and_saturation_about_grey():
    """Contrast scales pixels around their mean, saturation around their own grey value."""
    stripes = np.full((4, 4, 3), 60, np.uint8)
    stripes[::2] = 140
    found = augment_picture(
        stripes, dataclasses.replace(STILL, contrast=0.5), np.random.default_rng(1)
    )
    assert found.max() - 100.0 == pytest.approx(100.0 - found.min(), abs=1)
    grey = augment_picture(
        stripes, dataclasses.replace(STILL, saturation=0.9), np.random.default_rng(1)
    )
    np.testing.assert_array_equal(grey, stripes)


def test_uncovered_borders_have_the_configured_fill():
    config = dataclasses.replace(STILL, scale=0.5, fill=7)
    image = np.full((12, 12, 3), 200, np.uint8)
    corners = {
        int(augment_picture(image, config, np.random.default_rng(seed))[0, 0, 0])
        for seed in range(20)
    }
    assert 7 in corners and 200 in corners


def test_normalisation_constants_are_those_of_clip():
    assert CLIP_PICTURES.mean == (0.48145466, 0.4578275, 0.40821073)
    assert CLIP_PICTURES.std == (0.26862954, 0.26130258, 0.27577711)
    white = prepare_picture(np.full((30, 20, 3), 255, np.uint8), 8)
    np.testing.assert_allclose(white[3, 4], [1.93033, 2.07488, 2.14590], rtol=1e-4)


def test_long_side_is_cropped_in_the_middle():
    """From 8 x 31 resized to 4 x 15, columns 5 to 8 are seen."""
    image = np.zeros((8, 31, 3), np.uint8)
    image[:, 13:] = 255
    seen = prepare_picture(image, 4)[..., 0] > 0
    np.testing.assert_array_equal(seen, [[False, True, True, True]] * 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shift": 1.0}, r"^shift=1\.0 must be in \[0, 1\)"),
        ({"rotate": 200.0}, r"^rotate=200\.0"),
        ({"fill": 256}, r"^fill=256"),
    ],
)
def test_invalid_config_is_refused_by_key(fields, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**fields)
