"""Image files without labels, preprocessed like the test images of a run."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from common_jax.inputs import BadExample, Example
from common_jax.inputs.names import listed
from common_jax.inputs.pictures import decode_picture, find_images, pixels_of, read_file
from m2mkd_jax.data.augment import SMALL_SIDE
from m2mkd_jax.data.transforms import resize_and_centre


def find_pictures(places: Sequence[str]) -> list[str]:
    """The image files that `places` name: files as given, and all images anywhere below a folder,
    sorted.

    Raises:
      FileNotFoundError: for a place that does not exist, or a folder without images.
    """
    found = []
    for place in places:
        if os.path.isdir(place):
            inside = find_images(place)
            if not inside:
                raise FileNotFoundError(f"{place} has no images, not even in folders below it")
            found += inside
        elif os.path.exists(place):
            found.append(place)
        else:
            parent = Path(place).absolute().parent
            near = listed(os.listdir(parent)) if parent.is_dir() else f"there is no {parent}"
            raise FileNotFoundError(f"{place} does not exist; beside it: {near or 'nothing'}")
    return found


@dataclasses.dataclass(frozen=True)
class PictureFiles:
    """Examples {"image": uint8 (I, J, X)} of image files, at their own sizes."""

    paths: Sequence[str]
    channels: int
    arrays = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        try:
            picture = decode_picture(read_file(self.paths[index]), self.channels)
        except (OSError, ValueError) as error:
            raise BadExample(self.paths[index], str(error)) from error
        return {"image": pixels_of(picture)}

    def problem(self, index: int) -> str:
        """Why a picture cannot be read; "" if it can."""
        try:
            self[index]
        except BadExample as bad:
            return bad.reason
        return ""


@dataclasses.dataclass(frozen=True)
class SquareTransform:
    """Turns a picture of any size into a square of `side`; can be pickled.

    For `side` above SMALL_SIDE this is the evaluation transform, see `resize_and_centre`. Up to
    SMALL_SIDE evaluation never resizes, and its crop would cut too much away, so the largest
    central square is resized instead.
    """

    side: int

    def __call__(self, example: Example) -> Example:
        pixels = example["image"]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if self.side > SMALL_SIDE:
            image = resize_and_centre(image, self.side)
        elif image.size != (self.side, self.side):
            short = min(image.size)
            left, top = ((length - short) // 2 for length in image.size)
            image = image.crop((left, top, left + short, top + short))
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return example | {"image": pixels_of(image)}
