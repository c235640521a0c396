"""A source of labelled images: what all sets of images have in common."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np

from common_jax import inputs
from common_jax.inputs import Example
from m2mkd_jax.data.augment import SMALL_SIDE


@runtime_checkable
class Source(inputs.Source, Protocol):
    """Examples {"image": uint8 [I, J, X], "label": int32 []}."""

    @property
    def labels(self) -> np.ndarray:
        """Labels [len] int32, known without reading an image."""
        ...

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes; a label is an index into them."""
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A set in memory: arrays {"image": [len, I, J, X], "label": [len]}."""

    arrays: dict[str, np.ndarray]
    label_names: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        return self.arrays["label"]

    def __len__(self) -> int:
        return len(self.arrays["label"])

    def __getitem__(self, index: int) -> Example:
        return {name: array[index] for name, array in self.arrays.items()}


def require_side(size: tuple[int, int], side: int, name: str = "") -> None:
    """Raises ValueError, with the image's `name`, unless its `size`, rows and columns, is `side`
    twice."""
    height, width = size
    if (height, width) != (side, side):
        raise ValueError(
            f"{name}{': ' * bool(name)}{height} x {width} pixels do not fit config.data.image_size="
            f"{side}; up to {SMALL_SIDE} pixels images are not resized: set config.data.image_size "
            f"to their size or to more than {SMALL_SIDE}, or resize the files"
        )
