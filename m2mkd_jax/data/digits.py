"""scikit-learn's digits as arrays, and renditions of them that are drawn otherwise."""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageFilter

Picture = UInt8[np.ndarray, "I J"]

NAMES = tuple("0123456789")
TEST = 360  # the last ones of 1,797
SPLITS = {"train": slice(None, -TEST), "test": slice(-TEST, None)}

SIDE = 8
FINE = 8  # strokes are one or two pixels wide: they are turned and thickened in eighths of a pixel
# A 6 and a 9 are each other's rotation: with a turn on top it is less clear which is meant.
RENDERED = tuple("01234578")


def load_split(split: str) -> tuple[UInt8[np.ndarray, "N I J 1"], Int32[np.ndarray, "N"]]:
    """Images and labels of "train" (1,437) or "test" (360), read-only, labels as in NAMES.

    The set's values 0 to 16 are stretched to 0 to 255 (v * 255 / 16, rounded).
    """
    images, labels = _all_digits()
    return images[SPLITS[split]], labels[SPLITS[split]]


@functools.cache
def load_renditions() -> tuple[UInt8[np.ndarray, "N I J 1"], Int32[np.ndarray, "N"]]:
    """Every test image of the classes RENDERED in every one of RENDITIONS, one rendition after the
    other; read-only, labels as in RENDERED."""
    images, labels = load_split("test")
    label_of = np.full(len(NAMES), -1, np.int32)
    label_of[[NAMES.index(name) for name in RENDERED]] = np.arange(len(RENDERED))
    kept = label_of[labels] >= 0
    rendered = [render(image) for render in RENDITIONS.values() for image in images[kept, ..., 0]]
    renditions = np.stack(rendered)[..., None]
    labels = np.tile(label_of[labels[kept]], len(RENDITIONS))
    renditions.flags.writeable = labels.flags.writeable = False
    return renditions, labels


@functools.cache
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read once a process: parsing them takes longer than a short run."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = found.target.astype(np.int32)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def inverted(image: Picture) -> Picture:
    return 255 - image


def turned(image: Picture, *, degrees: float) -> Picture:
    """Turned about the centre, counter-clockwise if positive; black comes in at the corners."""
    return _coarse(_fine(image).rotate(degrees, Image.Resampling.BILINEAR))


def thickened(image: Picture) -> Picture:
    """Every stroke grows by 3/8 of a pixel to all sides (grey-scale dilation)."""
    return _coarse(_fine(image).filter(ImageFilter.MaxFilter(7)))


def thinned(image: Picture) -> Picture:
    """Every stroke shrinks by 3/8 of a pixel from all sides (grey-scale erosion)."""
    return _coarse(_fine(image).filter(ImageFilter.MinFilter(7)))


def _fine(image: Picture) -> Image.Image:
    return Image.fromarray(image).resize((SIDE * FINE, SIDE * FINE), Image.Resampling.BICUBIC)


def _coarse(image: Image.Image) -> Picture:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


RENDITIONS: dict[str, Callable[[Picture], Picture]] = {
    "inverted": inverted,
    "turned left": functools.partial(turned, degrees=25.0),
    "turned right": functools.partial(turned, degrees=-25.0),
    "thickened": thickened,
    "thinned": thinned,
}
