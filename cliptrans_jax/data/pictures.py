"""Preprocessing of pictures for the towers, and augmentation for contrastive training. Uses numpy
and PIL."""

import dataclasses
import math
from typing import Annotated

import numpy as np
from PIL import Image, ImageEnhance

from cliptrans_jax.towers.tower import CLIP_PICTURES, Pictures
from common_jax.config import Section
from common_jax.ranges import BelowOne, within


def prepare_picture(image: np.ndarray, size: int, pictures: Pictures = CLIP_PICTURES) -> np.ndarray:
    """A picture as a tower's input: resized to a square, or resized and cropped if
    `pictures.crops`, and normalised.

    Args:
      image: uint8 (I, J, 3), (I, J, 4) or (I, J).
      size: side of the output, 224 for CLIP ViT-B/32.
      pictures: mean, std, filter and cropping of the tower.

    Returns:
      float32 (size, size, 3).

    Raises:
      ValueError: another shape, or another dtype, whose range of values is unknown.
    """
    image = np.asarray(image)
    flat = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    if image.dtype != np.uint8 or not flat or not image.size:
        raise ValueError(
            f"a picture is {image.dtype} {image.shape}; give uint8 from 0 to 255 of shape "
            "(rows, columns), (rows, columns, 3) or (rows, columns, 4)"
        )
    # Drops transparency without blending, as CLIP's processors do.
    picture = Image.fromarray(image).convert("RGB")
    width, height = picture.size
    short = min(width, height)
    # The long side is rounded down to whole pixels, as CLIP's processors do.
    resized = (size * width // short, size * height // short) if pictures.crops else (size, size)
    if resized != picture.size:
        picture = picture.resize(resized, Image.Resampling[pictures.resampling])
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32)
    mean, std = (np.array(x, np.float32) for x in (pictures.mean, pictures.std))
    return (pixels / 255 - mean) / std


@dataclasses.dataclass(frozen=True)
class AugmentConfig(Section):
    """Strengths of augmentation of a training picture; each change is drawn uniformly up to its
    limit.

    Attributes:
      shift: largest shift along each axis, as a share of the side.
      scale: scales by 1 - scale to 1 + scale.
      rotate: largest rotation in either direction, in degrees.
      flip: mirrors half of the pictures. Beware: mirrored letters and arrows change their meaning.
      brightness, contrast, saturation: factors from 1 - x to 1 + x.
      fill: grey value of pixels outside the original picture.
    """

    shift: BelowOne = 0.08
    scale: BelowOne = 0.15
    rotate: Annotated[float, within(0, 180)] = 12.0
    flip: bool = False
    brightness: BelowOne = 0.2
    contrast: BelowOne = 0.2
    saturation: BelowOne = 0.3
    fill: Annotated[int, within(0, 255)] = 255


def augment_picture(
    image: np.ndarray, config: AugmentConfig, generator: np.random.Generator
) -> np.ndarray:
    """Randomly shifts, scales, rotates, mirrors and recolours a picture.

    Args:
      image: uint8 (I, J, 3).
      config: strengths of augmentation.
      generator: source of random numbers; every config draws the same number of them.

    Returns:
      uint8 (I, J, 3).
    """
    down, right, scale, turn, brightness, contrast, saturation = generator.uniform(-1, 1, 7)
    mirror = generator.random() < 0.5 and config.flip
    picture = Image.fromarray(image)
    columns, rows = picture.size
    # One map for all changes of place, so that pixels are interpolated only once.
    matrix = _pixel_matrix(
        (columns, rows),
        shift=(right * config.shift * columns, down * config.shift * rows),
        scale=1 + scale * config.scale,
        degrees=turn * config.rotate,
        mirror=mirror,
    )
    picture = picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BILINEAR,
        fillcolor=(config.fill,) * 3,
    )
    picture = ImageEnhance.Brightness(picture).enhance(1 + brightness * config.brightness)
    picture = ImageEnhance.Contrast(picture).enhance(1 + contrast * config.contrast)
    picture = ImageEnhance.Color(picture).enhance(1 + saturation * config.saturation)
    return np.asarray(picture)


def _pixel_matrix(
    size: tuple[int, int],
    *,
    shift: tuple[float, float],
    scale: float,
    degrees: float,
    mirror: bool,
) -> tuple[float, ...]:
    """Returns PIL's six affine coefficients, which map an output pixel (column, row) to its
    source."""
    # The inverse of the change: source = centre + matrix (output - centre - shift).
    centre = np.array(size) / 2
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.array([[cosine, -sine], [sine, cosine]]) / scale
    if mirror:
        matrix = np.diag([-1.0, 1.0]) @ matrix
    offset = centre - matrix @ (centre + np.array(shift))
    return (*matrix[0], offset[0], *matrix[1], offset[1])
