"""scikit-learn's digits and their renditions, against pixels worked out by hand."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from m2mkd_jax.data import digits

STEPS = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]


def test_load_split_scales_to_bytes_and_holds_out_the_last_images():
    published = load_digits()
    (images, labels), (test_images, test_labels) = map(digits.load_split, ("train", "test"))
    assert len(images) == 1437 and len(test_images) == 360
    stretched = np.array(STEPS)[published.images.astype(int)][..., None]
    np.testing.assert_array_equal(np.concatenate([images, test_images]), stretched)
    np.testing.assert_array_equal(np.concatenate([labels, test_labels]), published.target)
    assert not images.flags.writeable and labels.dtype == np.int32


def bar():
    """A vertical stroke, two pixels wide."""
    image = np.zeros((8, 8), np.uint8)
    image[:, 3:5] = 255
    return image


def centre(row):
    return (row * np.arange(8.0)).sum() / row.sum()


@pytest.mark.parametrize(("name", "sign"), [("turned left", -1), ("turned right", 1)])
def test_turned_digits_lean_by_25_degrees(name, sign):
    turned = digits.RENDITIONS[name](bar())
    lean = (centre(turned[1]) - centre(turned[6])) / 5  # should be 25 degrees
    assert sign * lean == pytest.approx(np.tan(np.radians(25)), abs=0.08)


def test_stroke_width_changes_by_three_quarters_of_a_pixel():
    row = bar()[4]
    thick, thin = (digits.RENDITIONS[name](bar())[4] for name in ("thickened", "thinned"))
    width = row.sum() / 255
    assert thick.sum() / 255 == pytest.approx(width + 0.75, abs=0.3)
    assert thin.sum() / 255 == pytest.approx(width - 0.75, abs=0.3)
    np.testing.assert_array_equal(digits.RENDITIONS["inverted"](bar()), 255 - bar())


def test_renditions_cover_all_test_images_except_6_and_9():
    images, labels = digits.load_renditions()
    originals, classes = digits.load_split("test")
    kept = [i for i, label in enumerate(classes) if label not in (6, 9)]
    assert [digits.RENDERED[label] for label in labels] == [str(classes[i]) for i in kept] * 5
    for start, render in enumerate(digits.RENDITIONS.values()):
        for place in (0, 100, len(kept) - 1):
            want = render(originals[kept[place]][..., 0])
            np.testing.assert_array_equal(images[start * len(kept) + place, ..., 0], want)
