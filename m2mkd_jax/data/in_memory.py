"""Sets that are small enough to be decoded once and kept in memory."""

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from common_jax.inputs import BadExample, Example, name_of
from common_jax.log import progress
from m2mkd_jax.data.files.listing import listed
from m2mkd_jax.data.source import Source, require_side

IN_MEMORY = ("auto", "always", "never")
# Limits up to which "auto" decodes a set into memory: image side, and bytes of all images.
MEMORY_SIDE = 64
MEMORY_BYTES = 256 * 2**20
CHUNK = 256  # images that a thread decodes at a time
SAMPLE = 10  # images that stand for the rest


class DecodedSource:
    """A set that was decoded up front: images [len, I, J, X], and the errors of the bad ones.

    `arrays` is None if any image is bad, so that bad ones are still counted and named on access.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        label_names: tuple[str, ...],
        bad: Mapping[int, BadExample],
    ):
        self.images = images
        self.labels = labels
        self.label_names = label_names
        self.bad = bad

    @property
    def arrays(self) -> dict[str, np.ndarray] | None:
        return None if self.bad else {"image": self.images, "label": self.labels}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        if index in self.bad:
            raise self.bad[index]
        return {"image": self.images[index], "label": self.labels[index]}


def decode_into_memory(source: Source, when: str, *, at: str, side: int | None = None) -> Source:
    """Decodes the source into memory if it should be kept there; otherwise returns it unchanged.

    Args:
      source: the images of one split.
      when: one of IN_MEMORY, as in config.data.in_memory.
      at: names the split in messages.
      side: the side that every image must have; None if any size will do.

    Raises:
      ValueError: an image of another size than `side`, "always" with images of different sizes, or
        none can be read.
    """
    if source.arrays is not None or when == "never":
        return source
    places = spaced(len(source))
    if when == "always":  # then one that can be read must be found
        places += sorted(set(range(len(source))).difference(places))
    sample, unread = (_read(source, index) for index in places), []
    for first in sample:
        if not isinstance(first, BadExample):
            break
        unread.append(str(first))
    else:
        first = None
    shape = (0, 0, 0) if first is None else first["image"].shape
    if first is not None and side is not None:
        shape = (side, side, shape[2])
    size = len(source) * int(np.prod(shape))
    fits = 0 < size <= MEMORY_BYTES and max(shape[:2]) <= MEMORY_SIDE
    if when == "auto" and not fits:
        return source
    if first is None:
        raise ValueError(
            f"{at}: none of {len(unread)} images can be read: {listed(unread)}; repair or remove "
            "them"
        )
    images, bad = np.zeros((len(source), *shape), np.uint8), {}

    def decode(start: int) -> tuple[int, tuple[int, ...]] | None:
        """Decodes a chunk; returns the first image whose shape differs, and its shape, or None."""
        for index in range(start, min(start + CHUNK, len(source))):
            example = _read(source, index)
            if isinstance(example, BadExample):
                bad[index] = example
            elif example["image"].shape != shape:
                return index, example["image"].shape
            else:
                images[index] = example["image"]
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, len(source), CHUNK)
        others = progress(pool.map(decode, starts), total=len(starts), title="decoding images")
        other = next((other for other in others if other is not None), None)
        # `next` stops at the first image of another size, and leaves the rest undecoded.
        pool.shutdown(cancel_futures=True)
    if other is None:
        logging.info("%s: %d images in memory, %.0f MiB", at, len(source), size / 2**20)
        names = source.label_names
        return DecodedSource(images, source.labels, label_names=names, bad=bad)
    index, other_shape = other
    if side is not None:
        require_side(other_shape[:2], side, name_of(source, index))
    if when == "always":
        raise ValueError(
            f"{at}: config.data.in_memory='always' needs images of one size, but there are some of "
            f"{_pixels(shape)} pixels and {name_of(source, index)} has {_pixels(other_shape)}; set "
            "it to 'auto' or resize the files"
        )
    return source


def spaced(size: int) -> list[int]:
    """The places of SAMPLE of `size` examples, evenly spaced, or of all if they are fewer."""
    return np.linspace(0, size - 1, min(SAMPLE, size)).astype(int).tolist()


def _read(source: Source, index: int) -> Example | BadExample:
    try:
        return source[index]
    except BadExample as bad:
        return bad


def _pixels(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"
