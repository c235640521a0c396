"""scikit-learn's digits as arrays, and renditions of them in different styles."""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageFilter

Picture = UInt8[np.ndarray, "I J"]

NAMES = tuple("0123456789")
TEST = 360  # the last 360 of 1,797
SPLITS = {"train": slice(None, -TEST), "test": slice(-TEST, None)}

SIDE = 8
FINE = 8  # strokes are one or two pixels wide: rotate and thicken them at 8 times the size
# Without 6 and 9, which are rotations of each other and would become ambiguous.
RENDERED = tuple("01234578")


def load_split(split: str) -> tuple[UInt8[np.ndarray, "B I J 1"], Int32[np.ndarray, " B"]]:
    """Returns read-only images and labels of "train" (1,437) or "test" (360), labels as in NAMES.

    The set's values 0 to 16 are scaled to 0 to 255 (v * 255 / 16, rounded).
    """
    images, labels = _all_digits()
    return images[SPLITS[split]], labels[SPLITS[split]]


@functools.cache
def load_renditions() -> tuple[UInt8[np.ndarray, "B I J 1"], Int32[np.ndarray, " B"]]:
    """Returns every test image of the classes RENDERED in each of RENDITIONS, with its label.

    Images are sorted by rendition; the arrays are read-only, labels as in RENDERED.
    """
    images, labels = load_split("test")
    label_of = np.full(len(NAMES), -1, np.int32)
    label_of[[NAMES.index(name) for name in RENDERED]] = np.arange(len(RENDERED))
    usable = label_of[labels] >= 0
    rendered = [render(image) for render in RENDITIONS.values() for image in images[usable, ..., 0]]
    renditions = np.stack(rendered)[..., None]
    labels = np.tile(label_of[labels[usable]], len(RENDITIONS))
    renditions.flags.writeable = labels.flags.writeable = False
    return renditions, labels


@functools.cache
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Loads the set once per process: parsing it takes longer than a short run."""
    from sklearn.datasets import load_digits

    dataset = load_digits()
    images = np.round(dataset.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = dataset.target.astype(np.int32)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def invert(image: Picture) -> Picture:
    return 255 - image


def rotate(image: Picture, *, degrees: float) -> Picture:
    """Rotates about the centre, counter-clockwise if positive, with black corners."""
    return _coarse(_fine(image).rotate(degrees, Image.Resampling.BILINEAR))


def thicken(image: Picture) -> Picture:
    """Grows every stroke by 3/8 of a pixel on all sides (grey-scale dilation)."""
    return _coarse(_fine(image).filter(ImageFilter.MaxFilter(7)))


def thin(image: Picture) -> Picture:
    """Shrinks every stroke by 3/8 of a pixel on all sides (grey-scale erosion)."""
    return _coarse(_fine(image).filter(ImageFilter.MinFilter(7)))


def _fine(image: Picture) -> Image.Image:
    return Image.fromarray(image).resize((SIDE * FINE, SIDE * FINE), Image.Resampling.BICUBIC)


def _coarse(image: Image.Image) -> Picture:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


RENDITIONS: dict[str, Callable[[Picture], Picture]] = {
    "inverted": invert,
    "turned left": functools.partial(rotate, degrees=25.0),
    "turned right": functools.partial(rotate, degrees=-25.0),
    "thickened": thicken,
    "thinned": thin,
}
