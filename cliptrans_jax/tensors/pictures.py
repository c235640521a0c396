"""Whether the JSON files beside an image tower ask for the pictures that it gets here."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from cliptrans_jax.tensors import open_clip
from cliptrans_jax.tensors.beside import Beside
from cliptrans_jax.towers.tower import Pictures
from common_jax.untrusted import brief
from common_jax.weights.beside import image_processors


def require_pictures(about: Beside, pictures: Pictures, side: int, file: str) -> None:
    """Raises ValueError if a file beside the weights asks for other pictures.

    Args:
      about: the files by name.
      pictures: how the tower's pictures are prepared.
      side: the tower's image size.
      file: the weights' file, for messages.
    """
    wrong = {
        name: _wrong(content, pictures, side)
        for name, content in image_processors(about, file).items()
    }
    content = about.get(open_clip.FILE, {}).get("preprocess_cfg")
    wrong[open_clip.FILE] = _wrong_open_clip(content, pictures, side)
    for name, settings in wrong.items():
        for key, value, expected in settings:
            raise ValueError(
                f"{file}: {name} says {key}={brief(value)}, but the tower's pictures are "
                f"{expected}; use a model whose pictures are, too"
            )


def _wrong(
    content: Mapping[str, Any], pictures: Pictures, side: int
) -> Iterator[tuple[str, Any, str]]:
    """(key, value, expectation) of each setting of Hugging Face's that differs; null and missing
    ones do not."""
    given = {key: value for key, value in content.items() if value is not None}
    steps = {
        "do_resize": "resized",
        "do_rescale": "scaled to [0, 1]",
        "do_normalize": "normalised",
    }
    for key, expected in steps.items():
        if given.get(key, True) is not True:
            yield key, given[key], expected
    filters = Image.Resampling[pictures.resampling]
    if given.get("resample", filters) != filters:
        expected = f"resized with {int(filters)}, {pictures.resampling}"
        yield "resample", given["resample"], expected
    if bool(given.get("do_center_crop", pictures.crops)) != pictures.crops:
        yield "do_center_crop", given["do_center_crop"], _cut(pictures)
    if not _close(given.get("rescale_factor", 1 / 255), 1 / 255, rtol=1e-4):
        yield "rescale_factor", given["rescale_factor"], "multiplied by 1/255"
    square = {"height": side, "width": side}
    size = {"shortest_edge": side} if pictures.crops else square
    if given.get("size", side) not in (side, size):
        yield "size", given["size"], f"resized with size={size}"
    if pictures.crops and given.get("crop_size", side) not in (side, square):
        yield "crop_size", given["crop_size"], f"cropped with crop_size={square}"
    yield from _statistics(given, {"mean": "image_mean", "std": "image_std"}, pictures)


def _wrong_open_clip(content: Any, pictures: Pictures, side: int) -> Iterator[tuple[str, Any, str]]:
    """The same for OpenCLIP's settings."""
    content = content if isinstance(content, dict) else {}
    given = {key: value for key, value in content.items() if value is not None}
    if given.get("size", side) not in (side, [side, side]):
        yield "size", given["size"], f"{side} pixels on each side"
    wanted = {
        "interpolation": pictures.resampling.lower(),
        "resize_mode": "shortest" if pictures.crops else "squash",
    }
    for key, value in wanted.items():
        if given.get(key, value) != value:
            expected = f"resized with {pictures.resampling} and {_cut(pictures)}, {value!r}"
            yield key, given[key], expected
    yield from _statistics(given, {"mean": "mean", "std": "std"}, pictures)


def _statistics(
    given: Mapping[str, Any], keys: Mapping[str, str], pictures: Pictures
) -> Iterator[tuple[str, Any, str]]:
    for name, key in keys.items():
        ours = getattr(pictures, name)
        if key in given and not _close(given[key], ours, atol=1e-4):
            yield key, given[key], f"prepared with {[round(x, 6) for x in ours]}"


def _close(value: Any, ours: Any, rtol: float = 0.0, atol: float = 0.0) -> bool:
    try:
        same = np.shape(value) == np.shape(ours) and np.allclose(value, ours, rtol, atol)
    except (TypeError, ValueError):
        return False
    return bool(same) and not isinstance(value, bool)


def _cut(pictures: Pictures) -> str:
    return "cropped to a square" if pictures.crops else "resized to a square without a crop"
