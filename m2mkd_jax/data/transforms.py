"""Image transforms on the host: decoded pixels in, uint8 of config.data.image_size out.

Large images are cropped and resized here with PIL, since the original results depend on its
filters. Small ones (side <= 32) pass unchanged unless RandAugment is on: the device crops and flips
them. The device also normalises and erases (m2mkd_jax/data/augment.py).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from common_jax.inputs import BadExample, Example, name_of
from common_jax.inputs.pictures import pixels_of
from m2mkd_jax.data.augment import SMALL_SIDE, AugmentConfig, geometry_on_device
from m2mkd_jax.data.in_memory import spaced
from m2mkd_jax.data.randaugment import randaugment
from m2mkd_jax.data.source import Source, require_side
from m2mkd_jax.data.sources import SOURCES, DataConfig, exact_side

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
LOG_ASPECT = (math.log(ASPECT[0]), math.log(ASPECT[1]))
Arrays = Mapping[str, np.ndarray]


def train_transform(
    config: DataConfig, augment: AugmentConfig, *, arrays: Arrays | None = None
) -> Callable[[Example, np.random.Generator], Example] | None:
    """Returns the random transform of a training example; None if the device does everything.

    In order: random crop, resized (side > 32) or padded (smaller); flip; RandAugment.

    Args:
      config, augment: config.data and config.augment.
      arrays: the source's arrays, if it is in memory; small images then need no transform.

    Raises:
      ValueError: the side of small images in `arrays` differs from config.data.image_size.
    """
    side = config.image_size
    if geometry_on_device(augment, side):
        return _size_check(config, arrays)
    return TrainTransform(side, augment)


def eval_transform(
    config: DataConfig, *, arrays: Arrays | None = None
) -> Callable[[Example], Example] | None:
    """Returns the fixed transform of an evaluation example; None if there is nothing to do.

    Side > 32: the shorter side is resized to int(256 / 224 * side), then the centre is cropped.
    Smaller images stay as they are, and so do those of `exact` sets. Takes the arguments of
    `train_transform`.
    """
    if SOURCES[config.source].exact:
        return None
    side = config.image_size
    return _size_check(config, arrays) if side <= SMALL_SIDE else EvalTransform(side)


def check_sides(source: Source, config: DataConfig) -> None:
    """Raises ValueError if one of a few images, evenly spaced, has a size that is refused.

    The others are checked as they are read, which for a test set is after training.
    """
    side = exact_side(config)
    if side is None or source.arrays is not None:
        return
    for index in spaced(len(source)):
        try:
            shape = source[index]["image"].shape
        except BadExample:
            continue  # counted when it is read again
        require_side(shape[:2], side, name_of(source, index))


@dataclasses.dataclass(frozen=True)
class PictureSource:
    """A source of PIL images for `TrainTransform`, so that pixels are copied only after the crop.

    This saves a tenth of the time per image. The source must have a method `picture`.
    """

    source: Source
    arrays = None

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Returns the name of image `index`, for messages."""
        return name_of(self.source, index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.source.picture(index), "label": self.source.labels[index]}


def with_pictures(source: Source, transform: Callable | None) -> Source | PictureSource:
    """Returns the source in the fastest form for a transform from `train_transform`."""
    pictures = isinstance(transform, TrainTransform) and hasattr(source, "picture")
    return PictureSource(source) if pictures else source


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Crop, flip and RandAugment of one image, to `side` x `side` pixels; can be pickled.

    The image is an array of pixels, (I, J, X), or a PIL image.
    """

    side: int
    augment: AugmentConfig

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> Example:
        augment, image = self.augment, example["image"]
        image = image if isinstance(image, Image.Image) else _image(image)
        if self.side > SMALL_SIDE:
            image = random_resized_crop(image, rng, side=self.side)
        else:
            require_side((image.height, image.width), self.side)
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
        return {**example, "image": pixels_of(image)}


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """`resize_and_centre` of one image; can be pickled."""

    side: int

    def __call__(self, example: Example) -> Example:
        image = resize_and_centre(_image(example["image"]), self.side)
        return example | {"image": pixels_of(image)}


@dataclasses.dataclass(frozen=True)
class SideCheck:
    """Raises ValueError for images whose side is not `side`; can be pickled."""

    side: int

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        require_side(example["image"].shape[:2], self.side)
        return example


def crop_box(rng: np.random.Generator, *, height: int, width: int) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width) of a random crop, in pixels.

    It is the first of 10 draws (relative area uniform in [0.08, 1], aspect ratio log-uniform in
    [3/4, 4/3]) that fits, or else the largest central crop with an aspect ratio in that range.
    (torchvision's RandomResizedCrop.get_params; sides round half to even.)
    """
    for _ in range(10):
        # A single call, since every call costs microseconds.
        area_draw, aspect_draw, y, x = rng.random(4).tolist()
        area = height * width * _between(AREA, area_draw)
        aspect = math.exp(_between(LOG_ASPECT, aspect_draw))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return int(y * (height - tall + 1)), int(x * (width - wide + 1)), tall, wide
    wide, tall = width, height
    if width / height < ASPECT[0]:
        tall = round(width / ASPECT[0])
    elif width / height > ASPECT[1]:
        wide = round(height * ASPECT[1])
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


def random_resized_crop(image: Image.Image, rng: np.random.Generator, *, side: int) -> Image.Image:
    """Takes a random crop (`crop_box`) and resizes it to `side` with PIL's bicubic filter."""
    # Not `resize(box=...)`, whose filter would also read pixels outside the crop.
    top, left, tall, wide = crop_box(rng, height=image.height, width=image.width)
    crop = image.crop((left, top, left + wide, top + tall))
    return crop.resize((side, side), Image.Resampling.BICUBIC)


def padded_crop(image: Image.Image, rng: np.random.Generator, *, padding: int) -> Image.Image:
    """Takes a crop of the image's own size, shifted by up to `padding` pixels of black padding."""
    left, top = (int(start) - padding for start in rng.integers(0, 2 * padding + 1, size=2))
    return image.crop((left, top, left + image.width, top + image.height))


def resize_and_centre(image: Image.Image, side: int) -> Image.Image:
    """Resizes the shorter side to int(256 / 224 * side), bicubic, and crops the central square."""
    short = int(256 / 224 * side)
    # Rounded down here, and half to even in the crop below, as by torchvision's Resize and
    # CenterCrop.
    scaled_long = int(short * max(image.size) / min(image.size))
    size = (short, scaled_long) if image.width <= image.height else (scaled_long, short)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _size_check(config: DataConfig, arrays: Arrays | None) -> SideCheck | None:
    """Checks the size of small images: now if they are in memory, else in the returned check."""
    if arrays is not None:
        require_side(arrays["image"].shape[1:3], config.image_size)
    checked = arrays is not None or SOURCES[config.source].exact
    return None if checked else SideCheck(config.image_size)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
