"""Parts of a set of images: an episode's, or a few of each class."""

import dataclasses
import functools
from typing import Protocol

import numpy as np

from common_jax import inputs
from common_jax.inputs import Example


class Labelled(inputs.Source, Protocol):
    """What `m2mkd_jax.data.sources.Source` says."""

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def label_names(self) -> tuple[str, ...]: ...


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some examples of a source, in the order of `indices` [n], with labels [n] of their own."""

    source: Labelled
    indices: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray] | None:
        if self.source.arrays is None:
            return None
        chosen = {name: array[self.indices] for name, array in self.source.arrays.items()}
        return chosen | {"label": self.labels}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])] | {"label": self.labels[index]}


def first_of_each_class(source: Labelled, count: int) -> Subset:
    """The first `count` examples of every class, in the order of the source.

    Raises:
      ValueError: a class has fewer.
    """
    labels, names = np.asarray(source.labels), source.label_names
    held = np.bincount(labels, minlength=len(names))
    if few := [f"{name} has {n}" for name, n in zip(names, held, strict=True) if n < count]:
        raise ValueError(
            f"config.data.per_class or test_per_class={count} asks for more images than some "
            f"classes have: {', '.join(few[:10])}; lower it"
        )
    rank = np.zeros(len(labels), np.int64)
    for label in range(len(names)):
        places = np.flatnonzero(labels == label)
        rank[places] = np.arange(len(places))
    chosen = np.flatnonzero(rank < count)
    return Subset(source, chosen, labels[chosen], names)
