"""Image files without labels, prepared as a run's evaluation prepares its test images."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from common_jax.inputs import BadExample, Example
from common_jax.inputs.pictures import decode_picture, pixels_of, read_file
from m2mkd_jax.data.augment import SMALL_SIDE
from m2mkd_jax.data.listing import is_hidden, is_image, listed
from m2mkd_jax.data.transforms import resize_and_centre


def find_pictures(places: Sequence[str]) -> list[str]:
    """The image files among `places` and in all folders below those that are folders, sorted
    within each.

    Raises:
      FileNotFoundError: for a place that does not exist, or a folder without an image.
    """
    found = []
    for place in places:
        if os.path.isdir(place):
            inside = [
                os.path.join(folder, name)
                for folder, folders, names in os.walk(place)
                if not _drop_hidden(folders)
                for name in names
                if is_image(name)
            ]
            if not inside:
                raise FileNotFoundError(f"{place} holds no image, in no folder below it")
            found += sorted(inside)
        elif os.path.exists(place):
            found.append(place)
        else:
            parent = Path(place).absolute().parent
            near = listed(os.listdir(parent)) if parent.is_dir() else f"there is no {parent}"
            raise FileNotFoundError(f"{place} does not exist; beside it: {near or 'nothing'}")
    return found


def _drop_hidden(folders: list[str]) -> None:
    """Keeps `os.walk` out of hidden folders."""
    folders[:] = [name for name in folders if not is_hidden(name)]


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
        """The reason for which a picture cannot be read; "" for one that can."""
        try:
            self[index]
        except BadExample as bad:
            return bad.reason
        return ""


@dataclasses.dataclass(frozen=True)
class SquareTransform:
    """A picture of any size as a square of `side`; can be pickled.

    Large ones as in evaluation, see `resize_and_centre`. Evaluation refuses to resize to at most
    SMALL_SIDE pixels, where such a crop would cut much away: here the largest central square is
    resized.
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
