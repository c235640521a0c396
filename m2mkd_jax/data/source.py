"""A source of labelled images: what all sets of images have in common."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np

from common_jax import inputs
from common_jax.inputs import Example


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
