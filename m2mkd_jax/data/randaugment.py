"""RandAugment with PIL: timm's policy `rand-m9-mstd0.5-inc1` and its 15 "increasing" operations.

Each operation takes (image, argument, fill); `level_argument` turns a magnitude in [0, 10] into the
argument. Geometric operations use bicubic resampling and fill uncovered pixels with `fill`.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Argument = float | int | None
Fill = tuple[int, int, int]
FILL = (124, 116, 104)  # the mean colour of ImageNet
LARGEST = 10.0


def auto_contrast(image: Image.Image, argument: None = None, fill: Fill = FILL) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, argument: None = None, fill: Fill = FILL) -> Image.Image:
    return ImageOps.equalize(image)


def invert(image: Image.Image, argument: None = None, fill: Fill = FILL) -> Image.Image:
    return ImageOps.invert(image)


def rotate(image: Image.Image, argument: float, fill: Fill = FILL) -> Image.Image:
    """Rotates by `argument` degrees about the centre, counter-clockwise if positive."""
    return image.rotate(argument, resample=Image.Resampling.BICUBIC, fillcolor=_fill(image, fill))


def posterize(image: Image.Image, argument: int, fill: Fill = FILL) -> Image.Image:
    """Keeps the top `argument` bits of each channel; 0 bits is a black image."""
    # At magnitude 10. Recent versions of Pillow refuse 0 bits; the one that the original pins gives
    # black.
    if argument == 0:
        return image.point([0] * (256 * len(image.getbands())))
    return ImageOps.posterize(image, argument) if argument < 8 else image


def solarize(image: Image.Image, argument: int, fill: Fill = FILL) -> Image.Image:
    """Inverts the pixels at and above `argument`."""
    return ImageOps.solarize(image, argument)


def solarize_add(image: Image.Image, argument: int, fill: Fill = FILL) -> Image.Image:
    """Adds `argument` to the pixels below 128, up to 255."""
    brighter = [min(255, value + argument) if value < 128 else value for value in range(256)]
    return image.point(brighter * len(image.getbands()))


def color(image: Image.Image, argument: float, fill: Fill = FILL) -> Image.Image:
    return ImageEnhance.Color(image).enhance(argument)


def contrast(image: Image.Image, argument: float, fill: Fill = FILL) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(argument)


def brightness(image: Image.Image, argument: float, fill: Fill = FILL) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(argument)


def sharpness(image: Image.Image, argument: float, fill: Fill = FILL) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(argument)


def shear_x(image: Image.Image, argument: float, fill: Fill = FILL) -> Image.Image:
    return _affine(image, (1, argument, 0, 0, 1, 0), fill)


def shear_y(image: Image.Image, argument: float, fill: Fill = FILL) -> Image.Image:
    return _affine(image, (1, 0, 0, argument, 1, 0), fill)


def translate_x(image: Image.Image, argument: float, fill: Fill = FILL) -> Image.Image:
    """output(x) = input(x + argument * width)."""
    return _affine(image, (1, 0, argument * image.size[0], 0, 1, 0), fill)


def translate_y(image: Image.Image, argument: float, fill: Fill = FILL) -> Image.Image:
    """output(y) = input(y + argument * height)."""
    return _affine(image, (1, 0, 0, 0, 1, argument * image.size[1]), fill)


def _affine(image: Image.Image, inverse: tuple[int | float, ...], fill) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        inverse,
        resample=Image.Resampling.BICUBIC,
        fillcolor=_fill(image, fill),
    )


def _fill(image: Image.Image, fill: tuple[int, int, int]) -> tuple[int, ...] | int:
    # A grey image takes the colour's brightness (ITU-R 601, PIL's own conversion).
    red, green, blue = fill
    return fill if image.mode == "RGB" else round(0.299 * red + 0.587 * green + 0.114 * blue)


def _signed(value: float, negative: bool) -> float:
    return -value if negative else value


OPERATIONS: dict[str, Callable[..., Image.Image]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Rotate": rotate,
    "PosterizeIncreasing": posterize,
    "SolarizeIncreasing": solarize,
    "SolarizeAdd": solarize_add,
    "ColorIncreasing": color,
    "ContrastIncreasing": contrast,
    "BrightnessIncreasing": brightness,
    "SharpnessIncreasing": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateXRel": translate_x,
    "TranslateYRel": translate_y,
}

NAMES = tuple(OPERATIONS)

# From (magnitude / 10, negative) to the argument; operations without one get None.
ARGUMENTS: dict[str, Callable[[float, bool], Argument]] = {
    "AutoContrast": lambda share, negative: None,
    "Equalize": lambda share, negative: None,
    "Invert": lambda share, negative: None,
    "Rotate": lambda share, negative: _signed(share * 30.0, negative),
    "PosterizeIncreasing": lambda share, negative: 4 - int(share * 4),
    "SolarizeIncreasing": lambda share, negative: 256 - int(share * 256),
    "SolarizeAdd": lambda share, negative: int(share * 110),
    "ColorIncreasing": lambda share, negative: 1.0 + _signed(share * 0.9, negative),
    "ContrastIncreasing": lambda share, negative: 1.0 + _signed(share * 0.9, negative),
    "BrightnessIncreasing": lambda share, negative: 1.0 + _signed(share * 0.9, negative),
    "SharpnessIncreasing": lambda share, negative: 1.0 + _signed(share * 0.9, negative),
    "ShearX": lambda share, negative: _signed(share * 0.3, negative),
    "ShearY": lambda share, negative: _signed(share * 0.3, negative),
    "TranslateXRel": lambda share, negative: _signed(share * 0.45, negative),
    "TranslateYRel": lambda share, negative: _signed(share * 0.45, negative),
}


def level_argument(name: str, magnitude: float, negative: bool) -> Argument:
    """Returns the argument of operation `name` at a magnitude in [0, 10].

    `negative` flips the sign of operations that have two directions.

    Raises:
      ValueError: no operation of that name.
    """
    if name not in ARGUMENTS:
        raise ValueError(f"RandAugment has no operation {name!r}; use one of {list(ARGUMENTS)}")
    return ARGUMENTS[name](magnitude / LARGEST, negative)


def randaugment(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    operations: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    probability: float = 0.5,
) -> Image.Image:
    """Applies `operations` operations, drawn with replacement, each with the given probability.

    The magnitude of each is Normal(magnitude, magnitude_std), clipped to [0, 10]; its sign is
    negative half of the time. (timm's RandAugment, auto_augment.py.)
    """
    # Only two calls for all draws, since every call costs microseconds.
    draws, levels = rng.random((operations, 3)).tolist(), rng.standard_normal(operations).tolist()
    for (choice, applied, sign), level in zip(draws, levels, strict=True):
        if applied >= probability:
            continue
        name = NAMES[int(choice * len(NAMES))]
        level = min(max(magnitude + magnitude_std * level, 0.0), LARGEST)
        image = OPERATIONS[name](image, level_argument(name, level, sign < 0.5))
    return image
