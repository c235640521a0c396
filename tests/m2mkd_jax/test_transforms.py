"""The host's crops, flips and resizing: boxes by hand, and every possible position of a crop."""

import itertools

import numpy as np
import pytest
from draws import Scripted, correlation
from PIL import Image

from m2mkd_jax.data import transforms
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.files.folders import FolderSource
from m2mkd_jax.data.files.listing import DirectoryFiles
from m2mkd_jax.data.sources import DataConfig

RGB = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def picture(seed, height, width):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def box_of(*tries, height=100, width=100):
    """The crop for tries of (area, aspect, down, right), each in [0, 1]."""
    rng = Scripted(*map(np.array, tries))
    box = transforms.crop_box(rng, height=height, width=width)
    assert rng.asked == [("random", 4)] * len(tries)
    return box


TOO_WIDE, TOO_TALL = (1.0, 1.0, 0.5, 0.5), (1.0, 0.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("draws", "size", "box"),
    [
        ((0.5, 0.5, 0.5, 0.5), (100, 100), (14, 14, 73, 73)),  # sqrt(0.54) of the side
        ((0.5, 0.5, 0.0, 0.999), (100, 100), (0, 27, 73, 73)),
        ((0.5, 1.0, 0.999, 0.0), (100, 100), (36, 0, 64, 85)),  # 4 : 3
        ((0.5, 0.0, 0.0, 0.999), (100, 100), (0, 36, 85, 64)),
        ((0.0, 0.5, 0.0, 0.0), (100, 100), (0, 0, 28, 28)),  # sqrt(0.08) of the side
        ((1.0, 0.5, 0.9, 0.9), (100, 100), (0, 0, 100, 100)),
        ((0.5, 0.5, 0.5, 0.5), (60, 90), (3, 18, 54, 54)),
    ],
)
def test_crops_by_hand(draws, size, box):
    assert box_of(draws, height=size[0], width=size[1]) == box


def test_crop_box_takes_first_fitting_try_of_ten():
    fits = (0.0, 0.5, 0.0, 0.0)
    assert box_of(TOO_WIDE, TOO_TALL, fits) == (0, 0, 28, 28)
    assert box_of(*[TOO_WIDE] * 9, fits) == (0, 0, 28, 28)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (100, 100, (0, 0, 100, 100)),
        (100, 120, (0, 0, 100, 120)),
        (3, 1000, (0, 498, 3, 4)),
        (1000, 3, (498, 0, 4, 3)),
        (90, 210, (0, 45, 90, 120)),
    ],
)
def test_crop_box_falls_back_to_the_centre(height, width, box):
    none = TOO_TALL if width > height else TOO_WIDE
    assert box_of(*[none] * 10, height=height, width=width) == box


@pytest.mark.parametrize(("height", "width"), [(40, 50), (224, 224), (10, 300), (300, 10)])
def test_random_crops_stay_inside_the_image_and_their_ranges(height, width):
    rng = np.random.default_rng(0)
    boxes = np.array([transforms.crop_box(rng, height=height, width=width) for _ in range(500)])
    top, left, tall, wide = boxes.T
    assert (top >= 0).all() and (top + tall <= height).all()
    assert (left >= 0).all() and (left + wide <= width).all()
    slack = 1 + 1 / boxes[:, 2:].min()  # sides are whole pixels
    assert (wide / tall <= 4 / 3 * slack).all() and (wide / tall >= 3 / 4 / slack).all()
    if height == width:
        share = tall * wide / (height * width)
        assert share.min() < 0.12 and share.max() > 0.9 and share.min() > 0.075
        assert len(np.unique(top)) > 50


def test_random_crops_reach_every_edge_and_both_aspects():
    rng = np.random.default_rng(0)
    boxes = np.array([transforms.crop_box(rng, height=60, width=60) for _ in range(4000)])
    top, left, tall, wide = boxes.T
    assert top.min() == left.min() == 0
    inside = (tall < 50) & (wide < 50)
    assert (top + tall)[inside].max() == (left + wide)[inside].max() == 60
    log_aspect = np.log(wide / tall)
    assert log_aspect.min() < np.log(3 / 4) + 0.02 and log_aspect.max() > np.log(4 / 3) - 0.02
    assert abs(log_aspect.mean()) < 0.01
    down, right = top[inside] / (60 - tall[inside]), left[inside] / (60 - wide[inside])
    assert abs(down.mean() - 0.5) < 0.03 and abs(right.mean() - 0.5) < 0.03
    assert correlation((tall * wide)[inside], log_aspect[inside], down, right) < 0.08


def test_random_resized_crop_cuts_before_resizing():
    image = picture(0, 100, 110)
    rng = Scripted(np.array((0.0, 1.0, 0.5, 0.999)))
    height, width = 26, 34  # 880 pixels, 4 : 3
    crop = np.asarray(image)[37 : 37 + height, 76 : 76 + width]
    want = Image.fromarray(crop).resize((40, 40), Image.Resampling.BICUBIC)
    found = transforms.random_resized_crop(image, rng, side=40)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(want))


def windows(pixels, padding):
    """Every crop of the padded image, followed by all of them mirrored."""
    side = len(pixels)
    padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)))
    places = range(2 * padding + 1)
    crops = np.stack(
        [padded[i : i + side, j : j + side] for i, j in itertools.product(places, places)]
    )
    return np.concatenate([crops, crops[:, :, ::-1]])


@pytest.mark.parametrize("channels", [1, 3])
def test_padded_crops_and_flips_are_uniform(channels):
    pixels = np.random.default_rng(0).integers(1, 256, (5, 5, channels), dtype=np.uint8)
    transform = transforms.TrainTransform(5, AugmentConfig(padding=1, flip=True))
    rng = np.random.default_rng(1)
    example = {"image": pixels, "label": np.int32(3), "more": 7}
    results = [transform(example, rng) for _ in range(1800)]
    assert all(one["label"] == 3 and one["more"] == 7 for one in results)
    found = np.stack([one["image"] for one in results])
    hits = (found[:, None] == windows(pixels, 1)).all(axis=(2, 3, 4))
    assert (hits.sum(axis=1) == 1).all()
    counts = hits.sum(axis=0)  # 100 each, with a standard deviation of 10
    assert counts.min() > 60 and counts.max() < 140


def test_default_transform_is_identity():
    pixels = np.asarray(picture(0, 32, 32))  # the largest size that is not resized
    transform = transforms.TrainTransform(32, AugmentConfig())
    rng = np.random.default_rng(0)
    for _ in range(20):
        np.testing.assert_array_equal(transform({"image": pixels}, rng)["image"], pixels)


def test_randaugment_runs_last_with_its_settings(monkeypatch):
    asked = []

    def invert(image, rng, **settings):
        asked.append(settings)
        return image.point([255 - value for value in range(256)] * 3)

    monkeypatch.setattr(transforms, "randaugment", invert)
    given = {"operations": 3, "magnitude": 4.0, "magnitude_std": 0.25}
    config = AugmentConfig(padding=2, flip=True, randaugment=True, **given)
    pixels = np.random.default_rng(0).integers(1, 256, (5, 5, 3), dtype=np.uint8)
    found = transforms.TrainTransform(5, config)({"image": pixels}, np.random.default_rng(3))
    assert asked == [given]
    assert (255 - found["image"] == windows(pixels, 2)).all(axis=(1, 2, 3)).any()


def test_large_images_are_cropped_and_flipped_half_the_time():
    """Columns rise from left to right, so a mirrored crop falls."""
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8), (70, 80))[..., None]
    transform = transforms.TrainTransform(33, AugmentConfig(flip=True))
    rng = np.random.default_rng(0)
    found = np.stack([transform({"image": ramp}, rng)["image"] for _ in range(400)])
    assert found.shape == (400, 33, 33, 1)
    rises = found[:, 16, -1, 0] > found[:, 16, 0, 0]
    assert 0.42 < rises.mean() < 0.58


def test_centre_crop_by_hand():
    wide = picture(0, 60, 90)
    scaled = wide.resize((61, 41), Image.Resampling.BICUBIC)  # int(256 / 224 * 36), int(61.5)
    want = np.asarray(scaled)[2:38, 12:48]  # 2.5 and 12.5, rounded to even
    np.testing.assert_array_equal(np.asarray(transforms.resize_and_centre(wide, 36)), want)
    tall = picture(1, 90, 60)
    want = np.asarray(tall.resize((41, 61), Image.Resampling.BICUBIC))[12:48, 2:38]
    np.testing.assert_array_equal(np.asarray(transforms.resize_and_centre(tall, 36)), want)


@pytest.mark.parametrize(("side", "short"), [(224, 256), (384, 438), (392, 448)])
def test_published_resize_sides(side, short):
    image = picture(0, short, short).convert("L")
    edge = (short - side) // 2
    want = np.asarray(image)[edge : edge + side, edge : edge + side]
    np.testing.assert_array_equal(np.asarray(transforms.resize_and_centre(image, side)), want)


def test_evaluation_resizes_only_images_larger_than_32_pixels():
    grey = {"source": "folder", "labels": 2}
    assert transforms.eval_transform(DataConfig()) is None
    small = transforms.eval_transform(DataConfig(image_size=32, **grey))
    pixels = np.asarray(picture(0, 32, 32))
    assert small({"image": pixels})["image"] is pixels
    large = transforms.eval_transform(DataConfig(image_size=33, **grey))
    found = large({"image": np.asarray(picture(0, 50, 40)), "label": 1})
    assert found["image"].shape == (33, 33, 3) and found["label"] == 1


def test_host_does_only_what_the_device_cannot():
    grey = {"source": "folder", "labels": 2}
    small, large = (DataConfig(image_size=side, **grey) for side in (32, 33))
    plain, rand = AugmentConfig(padding=1, flip=True), AugmentConfig(randaugment=True)
    held = {"image": np.zeros((2, 32, 32, 1), np.uint8)}
    assert transforms.train_transform(small, plain, arrays=held) is None
    assert isinstance(transforms.train_transform(small, plain), transforms.SideCheck)
    for config, augment in ((small, rand), (large, plain), (large, rand)):
        transform = transforms.train_transform(config, augment)
        assert transform == transforms.TrainTransform(config.image_size, augment)
    wrong = {"image": np.zeros((2, 32, 31, 1), np.uint8)}
    with pytest.raises(ValueError, match=r"^32 x 31 pixels do not fit .*image_size=32"):
        transforms.train_transform(small, plain, arrays=wrong)


def test_pictures_and_pixels_transform_alike(tmp_path):
    for number in range(2):
        picture(number, 40, 50).save(tmp_path / f"{number}.png")
    files, labels = DirectoryFiles(tmp_path, ("0.png", "1.png")), np.array([1, 0], np.int32)
    source = FolderSource(files, labels, label_names=("a", "b"), channels=3)
    transform = transforms.TrainTransform(36, AugmentConfig(flip=True, randaugment=True))
    pictures = transforms.with_pictures(source, transform)
    assert len(pictures) == 2 and pictures.arrays is None
    for index in range(2):
        assert isinstance(pictures[index]["image"], Image.Image)
        one, other = (
            transform(each[index], np.random.default_rng(index)) for each in (source, pictures)
        )
        np.testing.assert_array_equal(one["image"], other["image"])
        assert one["label"] == other["label"] == labels[index]
    assert transforms.with_pictures(source, None) is source
    assert transforms.with_pictures(source, transforms.SideCheck(36)) is source
