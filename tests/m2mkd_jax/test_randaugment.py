"""RandAugment: the effect of each operation on pixels, its arguments, and how often it is drawn."""

import itertools

import numpy as np
import pytest
from draws import correlation
from PIL import Image

from m2mkd_jax.data import randaugment as policy
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.randaugment import FILL, NAMES, OPERATIONS, level_argument, randaugment

GREY_FILL = 117  # 0.299 * 124 + 0.587 * 116 + 0.114 * 104
SQUARE = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def picture(seed, height=40, width=50):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def apply(name, argument, pixels):
    """The pixels after operation `name`, as lists."""
    image = Image.fromarray(np.array(pixels, np.uint8))
    return np.asarray(OPERATIONS[name](image, argument)).tolist()


@pytest.mark.parametrize(
    ("name", "argument", "pixels", "want"),
    [
        ("AutoContrast", None, [[50, 100, 150]], [[0, 127, 255]]),
        ("Invert", None, [[0, 10, 255]], [[255, 245, 0]]),
        ("Rotate", 90, SQUARE, [[3, 6, 9], [2, 5, 8], [1, 4, 7]]),
        ("PosterizeIncreasing", 1, [[127, 128, 255]], [[0, 128, 128]]),
        ("PosterizeIncreasing", 3, [[31, 32, 255]], [[0, 32, 224]]),
        ("SolarizeIncreasing", 128, [[10, 127, 128, 200]], [[10, 127, 127, 55]]),
        ("SolarizeAdd", 100, [[10, 127, 128, 200]], [[110, 227, 128, 200]]),
        ("SolarizeAdd", 150, [[100, 120, 130]], [[250, 255, 130]]),
        ("BrightnessIncreasing", 0.5, [[0, 100, 200]], [[0, 50, 100]]),
        ("BrightnessIncreasing", 1.5, [[0, 100, 200]], [[0, 150, 255]]),
        ("ContrastIncreasing", 0.0, [[0, 100, 200]], [[100, 100, 100]]),
        ("ContrastIncreasing", 1.5, [[0, 100, 200]], [[0, 100, 250]]),
        ("ColorIncreasing", 1.0, [[[9, 60, 200]]], [[[9, 60, 200]]]),
        # Each row moves by twice its index plus one, sheared around a pixel's centre.
        ("ShearX", 2, [[1, 2, 3, 4], [5, 6, 7, 8]], [[2, 3, 4, 117], [8, 117, 117, 117]]),
        ("ShearY", 2, [[1, 2], [3, 4], [5, 6]], [[3, 117], [5, 117], [117, 117]]),
        ("TranslateXRel", 0.25, [[1, 2, 3, 4], [5, 6, 7, 8]], [[2, 3, 4, 117], [6, 7, 8, 117]]),
        ("TranslateXRel", -0.5, [[1, 2, 3, 4]], [[117, 117, 1, 2]]),
        ("TranslateYRel", 0.5, [[1, 2, 3], [4, 5, 6]], [[4, 5, 6], [117, 117, 117]]),
        ("TranslateYRel", -0.5, [[1, 2, 3], [4, 5, 6]], [[117, 117, 117], [1, 2, 3]]),
    ],
)
def test_operations_by_hand(name, argument, pixels, want):
    assert apply(name, argument, pixels) == want


def test_color_desaturates_and_oversaturates():
    grey, beyond = (apply("ColorIncreasing", by, [[[200, 100, 0]]])[0][0] for by in (0.0, 1.5))
    assert grey == [118] * 3  # ITU-R 601
    assert beyond == [241, 91, 0]


def test_sharpness_blurs_and_sharpens():
    spot = [[50] * 5 for _ in range(5)]
    spot[2][2] = 100
    smooth, sharp = (apply("SharpnessIncreasing", by, spot)[2][2] for by in (0.0, 2.0))
    assert smooth == 69 and sharp == 131  # (8 * 50 + 5 * 100) / 13, and as far the other way


def test_equalize_spreads_close_values():
    """Of four equally frequent values, all but the first are a third apart."""
    values = np.asarray(
        apply("Equalize", None, np.repeat(np.arange(100, 104), 255).reshape(30, 34))
    )
    assert np.unique(values).tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"])
def test_fill_is_the_mean_colour_of_imagenet(name):
    assert FILL == (124, 116, 104)
    white = Image.new("RGB", (20, 20), (255,) * 3)
    for image, fill in ((white, FILL), (white.convert("L"), GREY_FILL)):
        moved = OPERATIONS[name](image, 45.0)
        assert moved.getpixel((0, 0)) == moved.getpixel((19, 19)) == fill


@pytest.mark.parametrize(
    ("name", "at_5", "at_9"),
    [
        ("AutoContrast", (None, None), (None, None)),
        ("Equalize", (None, None), (None, None)),
        ("Invert", (None, None), (None, None)),
        ("Rotate", (15, -15), (27, -27)),
        ("PosterizeIncreasing", (2, 2), (1, 1)),
        ("SolarizeIncreasing", (128, 128), (26, 26)),
        ("SolarizeAdd", (55, 55), (99, 99)),
        ("ColorIncreasing", (1.45, 0.55), (1.81, 0.19)),
        ("ContrastIncreasing", (1.45, 0.55), (1.81, 0.19)),
        ("BrightnessIncreasing", (1.45, 0.55), (1.81, 0.19)),
        ("SharpnessIncreasing", (1.45, 0.55), (1.81, 0.19)),
        ("ShearX", (0.15, -0.15), (0.27, -0.27)),
        ("ShearY", (0.15, -0.15), (0.27, -0.27)),
        ("TranslateXRel", (0.225, -0.225), (0.405, -0.405)),
        ("TranslateYRel", (0.225, -0.225), (0.405, -0.405)),
    ],
)
def test_arguments_by_hand(name, at_5, at_9):
    for magnitude, (plain, turned) in ((5.0, at_5), (9.0, at_9)):
        assert level_argument(name, magnitude, False) == pytest.approx(plain)
        assert level_argument(name, magnitude, True) == pytest.approx(turned)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_operation_changes_pixels_and_keeps_size_and_mode(name, mode):
    image = picture(3).point([40 + value // 2 for value in range(256)] * 3).convert(mode)
    for magnitude, negative in itertools.product((7.0, 10.0), (False, True)):
        changed = OPERATIONS[name](image, level_argument(name, magnitude, negative))
        assert changed.size == image.size and changed.mode == mode
        is_grey_colour = mode == "L" and name == "ColorIncreasing"
        assert (changed.tobytes() == image.tobytes()) == is_grey_colour


def test_signs_and_unknown_operations():
    assert level_argument("Rotate", 9.0, True) == -level_argument("Rotate", 9.0, False) == -27
    assert level_argument("PosterizeIncreasing", 10.0, False) == 0
    black = OPERATIONS["PosterizeIncreasing"](picture(0), 0)
    assert black.getextrema() == ((0, 0),) * 3
    with pytest.raises(ValueError, match="no operation 'Rotat'"):
        level_argument("Rotat", 9.0, False)


def test_randaugment_is_reproducible_and_leaves_a_quarter_unchanged():
    image = picture(5, 24, 24)
    results = [randaugment(image, np.random.default_rng(seed)).tobytes() for seed in range(400)]
    assert results[7] == randaugment(image, np.random.default_rng(7)).tobytes()
    # Neither of two operations runs with probability 1/4; few others leave the image unchanged.
    assert 0.2 < results.count(image.tobytes()) / 400 < 0.4


def drawn(monkeypatch, *, images=4000, **settings):
    """(index in NAMES, magnitude, negative) of each operation that is applied, image by image."""
    said = []

    def note(name, magnitude, negative):
        said[-1].append((NAMES.index(name), magnitude, negative))

    monkeypatch.setattr(policy, "level_argument", note)
    for name in NAMES:
        monkeypatch.setitem(OPERATIONS, name, lambda image, argument: image)
    rng = np.random.default_rng(0)
    for _ in range(images):
        said.append([])
        randaugment(None, rng, **settings)
    return said


def test_default_policy_is_m9_mstd0_5_with_two_operations(monkeypatch):
    said = drawn(monkeypatch)
    shares = np.bincount([len(one) for one in said]) / len(said)
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.03)
    places, magnitudes, negatives = map(np.array, zip(*itertools.chain(*said), strict=True))
    counts = np.bincount(places, minlength=15)  # 267 each, with a standard deviation of 16
    assert len(counts) == 15 and counts.min() > 200 and counts.max() < 335
    assert abs(magnitudes.mean() - 9) < 0.04 and abs(magnitudes.std() - 0.5) < 0.04
    assert magnitudes.max() == 10 and 6.5 < magnitudes.min() < 7.7
    assert abs(negatives.mean() - 0.5) < 0.03
    assert correlation(places, magnitudes, negatives) < 0.06
    config = AugmentConfig()
    assert (config.operations, config.magnitude, config.magnitude_std) == (2, 9, 0.5)


def test_operations_are_drawn_independently_with_replacement(monkeypatch):
    pairs = np.array([one for one in drawn(monkeypatch) if len(one) == 2], float)
    first, second = pairs[:, 0].T, pairs[:, 1].T
    assert correlation(*first, *second) < 0.12
    assert 0.03 < (first[0] == second[0]).mean() < 0.11  # one in fifteen


def test_randaugment_draws_follow_settings(monkeypatch):
    settings = {"operations": 3, "magnitude": 0.2, "magnitude_std": 0.4, "probability": 1.0}
    said = drawn(monkeypatch, images=400, **settings)
    assert {len(one) for one in said} == {3}
    magnitudes = np.array(list(itertools.chain(*said)))[:, 1]
    assert magnitudes.min() == 0 and 1.0 < magnitudes.max() < 2.0
    still = drawn(monkeypatch, images=20, magnitude=3.0, magnitude_std=0.0)
    assert {magnitude for _, magnitude, _ in itertools.chain(*still)} == {3.0}
    assert not any(drawn(monkeypatch, images=20, probability=0.0))
