"""What the host does to one image: decoded pixels in, uint8 pixels of config.data.image_size out.

Large images are cropped and resized here with PIL, because that is what the originals' numbers rest
on. Small ones (side <= 32) pass as they are unless RandAugment is on: the device crops and flips
them. Normalising and random erasing are the device's too (m2mkd_jax/data/augment.py).
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from common_jax.inputs import Example
from m2mkd_jax.data.augment import SMALL_SIDE, AugmentConfig, geometry_on_device
from m2mkd_jax.data.randaugment import randaugment
from m2mkd_jax.data.sources import EMBEDDED, DataConfig

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)


def train_transform(
    config: DataConfig, augment: AugmentConfig
) -> Callable[[Example, np.random.Generator], Example] | None:
    """The random transform of a training example; None where the device does everything.

    In order: a random crop, resized (side > 32) or padded crop (smaller); flip; RandAugment.
    The embedded sets already have their size, so that they stay in memory without a transform.
    """
    side = config.image_size
    if geometry_on_device(augment, side):
        return None if config.source in EMBEDDED else _check_side(side)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        image = _image(example)
        if side > SMALL_SIDE:
            image = random_resized_crop(image, rng, side=side)
        else:
            _require_side(example, side)
            image = padded_crop(image, rng, padding=augment.padding)
        if augment.flip and rng.uniform() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if augment.randaugment:
            image = randaugment(
                image,
                rng,
                operations=augment.operations,
                magnitude=augment.magnitude,
                magnitude_std=augment.magnitude_std,
            )
        return example | {"image": _pixels(image)}

    return transform


def eval_transform(config: DataConfig) -> Callable[[Example], Example] | None:
    """The fixed transform of an evaluation example; None for the embedded sets.

    Side > 32: the shorter side is resized to int(256 / 224 * side), then the centre is cut out.
    Smaller: as it is.
    """
    side = config.image_size
    if config.source in EMBEDDED:
        return None
    if side <= SMALL_SIDE:
        check = _check_side(side)
        return lambda example: check(example, None)
    return lambda example: example | {"image": _pixels(resize_and_centre(_image(example), side))}


def crop_box(rng: np.random.Generator, *, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, in pixels.

    Of 10 draws (area share uniform in [0.08, 1], aspect log-uniform in [3/4, 4/3]) the first that
    fits; else the largest central crop of an aspect in that range. (torchvision's
    RandomResizedCrop.get_params; sides round half to even.)
    """
    for _ in range(10):
        area = height * width * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            top = int(rng.integers(0, height - tall + 1))
            left = int(rng.integers(0, width - wide + 1))
            return top, left, tall, wide
    wide, tall = width, height
    if width / height < ASPECT[0]:
        tall = round(width / ASPECT[0])
    elif width / height > ASPECT[1]:
        wide = round(height * ASPECT[1])
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def random_resized_crop(image: Image.Image, rng: np.random.Generator, *, side: int) -> Image.Image:
    """A random crop (`crop_box`), resized to the side with PIL's bicubic filter."""
    top, left, tall, wide = crop_box(rng, height=image.height, width=image.width)
    crop = image.crop((left, top, left + wide, top + tall))
    return crop.resize((side, side), Image.Resampling.BICUBIC)


def padded_crop(image: Image.Image, rng: np.random.Generator, *, padding: int) -> Image.Image:
    """A crop of the image's own size, moved by up to `padding` pixels; what comes in is black."""
    left, top = (int(start) - padding for start in rng.integers(0, 2 * padding + 1, size=2))
    return image.crop((left, top, left + image.width, top + image.height))


def resize_and_centre(image: Image.Image, side: int) -> Image.Image:
    """Shorter side to int(256 / 224 * side), bicubic; then the central square of `side`."""
    short = int(256 / 224 * side)
    scaled_long = int(short * max(image.size) / min(image.size))
    size = (short, scaled_long) if image.width <= image.height else (scaled_long, short)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _check_side(side: int) -> Callable[[Example, np.random.Generator | None], Example]:
    def transform(example: Example, rng: np.random.Generator | None) -> Example:
        _require_side(example, side)
        return example

    return transform


def _require_side(example: Example, side: int) -> None:
    height, width = example["image"].shape[:2]
    if (height, width) != (side, side):
        raise ValueError(
            f"config.data.image_size={side}, but an image is {height} x {width} pixels; images of "
            f"up to {SMALL_SIDE} pixels are not resized: set config.data.image_size to their size "
            "or resize the files"
        )


def _image(example: Example) -> Image.Image:
    pixels = example["image"]
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
