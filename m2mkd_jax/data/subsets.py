"""Sources derived from others: selected examples, a few of each class, and a test set relabelled
with the training set's classes."""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import numpy as np

from common_jax.inputs import BadExample, Example, name_of
from m2mkd_jax.data.files.listing import listed
from m2mkd_jax.data.source import Source


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some examples of a source, in the order of `indices` [n], with their own labels [n]."""

    source: Source
    indices: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray] | None:
        if self.source.arrays is None:
            return None
        arrays = {name: array[self.indices] for name, array in self.source.arrays.items()}
        return arrays | {"label": self.labels}

    @functools.cached_property
    def bad(self) -> dict[int, BadExample]:
        """The images that are known to be bad, by their place."""
        bad = getattr(self.source, "bad", {})
        places = enumerate(self.indices.tolist() if bad else ())
        return {place: bad[index] for place, index in places if index in bad}

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Returns the name of image `index`, for messages."""
        return name_of(self.source, int(self.indices[index]))

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])] | {"label": self.labels[index]}


def first_of_each_class(source: Source, count: int) -> Subset:
    """Returns the first `count` examples of every class, in the order of the source.

    Raises:
      ValueError: a class with fewer examples.
    """
    labels, names = np.asarray(source.labels), source.label_names
    counts = np.bincount(labels, minlength=len(names))
    if few := [f"{name} has {n}" for name, n in zip(names, counts, strict=True) if n < count]:
        raise ValueError(
            f"config.data.per_class or test_per_class={count} asks for more images than some "
            f"classes have: {', '.join(few[:10])}; lower it"
        )
    indices = np.flatnonzero(_rank(labels, np.arange(len(labels))) < count)
    return Subset(source, indices, labels[indices], names)


def share_of_each_class(source: Source, share: float, *, seed: int, test: bool) -> Subset:
    """Returns the part of every class that is drawn for testing, or the rest of it.

    Args:
      source: all examples.
      share: share of each class to test on, rounded; at least one example, and never all of them.
      seed: seed of the draw, which depends only on it and the labels.
      test: whether to return the examples to test on, or those to train on.

    Raises:
      ValueError: a class with a single example.
    """
    labels, names = np.asarray(source.labels), source.label_names
    counts = np.bincount(labels, minlength=len(names))
    if single := [name for name, count in zip(names, counts, strict=True) if count < 2]:
        raise ValueError(
            f"config.data.test_share={share:g} needs two images of each class, but there are fewer "
            f"of {listed(single)}; add some, or remove the classes"
        )
    tested = np.clip(np.round(share * counts).astype(int), 1, counts - 1)
    # The same draw for training and test, so that the two parts never overlap.
    rank = _rank(labels, np.random.default_rng(seed).permutation(len(labels)))
    indices = np.flatnonzero((rank < tested[labels]) == test)
    logging.info(
        "%d of %d images to %s (config.data.test_share=%g of each class, split_seed=%d)",
        *(len(indices), len(labels), "test on" if test else "train on", share, seed),
    )
    return Subset(source, indices, labels[indices], names)


def _rank(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns each example's rank among the examples of its class, taken in the given order."""
    rank = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        places = order[labels[order] == label]
        rank[places] = np.arange(len(places))
    return rank


def match_classes(
    names: Sequence[str], base_names: Sequence[str], *, at: str, way_out: str
) -> tuple[int, ...]:
    """Returns the place of each of `names` in `base_names`.

    Args:
      names: classes of another set.
      base_names: classes of the training set.
      at: name of the other set, for messages.
      way_out: what to do about classes that the training set lacks, for messages.

    Raises:
      ValueError: a class that the training set lacks.
    """
    place = {name: index for index, name in enumerate(base_names)}
    unknown = [name for name in names if name not in place]
    if unknown:
        numbers = ""
        if all(name.isdecimal() for name in names):
            numbers = (
                "These are class numbers without names, as in ImageNetV2, whose folder i is the "
                "i-th wnid in sorted order, from 0. "
            )
        raise ValueError(
            f"{at} has {len(names)} classes, but config.data lacks {len(unknown)} of them: "
            f"{listed(unknown)}; its {len(place)} classes are {listed(place)}. {numbers}{way_out}"
        )
    return tuple(place[name] for name in names)


def with_labels_of(source: Source, base_names: Sequence[str], *, at: str) -> Source:
    """Relabels a test set with the training set's classes, `base_names`.

    Classes are matched by name, so labels do not shift if the order differs or some classes have no
    test images.

    Raises:
      ValueError: a class that the training set lacks; `at` names the test set.
    """
    names = tuple(source.label_names)
    if names == tuple(base_names):
        return source
    way_out = "Rename the folders to the training set's names (such as wnids) or remove them"
    places = match_classes(names, base_names, at=at, way_out=way_out)
    logging.warning("%s has %d of the %d classes of training", at, len(names), len(base_names))
    labels = np.array(places, np.int32)[np.asarray(source.labels)]
    return Subset(source, np.arange(len(source)), labels, tuple(base_names))
