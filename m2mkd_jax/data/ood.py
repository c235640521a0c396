"""Out-of-distribution test sets with some of the training set's classes, such as ImageNet-R."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from common_jax.config import Section, renamed, under
from common_jax.ranges import Name, one_of
from m2mkd_jax.data.files.folders import read_names
from m2mkd_jax.data.files.listing import listed
from m2mkd_jax.data.source import Source
from m2mkd_jax.data.sources import SOURCES, DataConfig, open_source
from m2mkd_jax.data.subsets import Subset, match_classes


@dataclasses.dataclass(frozen=True)
class OodConfig(Section):
    """`config.ood`: the OOD test set. All other settings of its images are those of config.data.

    Attributes:
      source: a key of SOURCES; "" for no OOD set.
      path: like config.data.path.
      split: folder name under `path`; "test" for `digits_r`, `imagenet_r` and `tiny_imagenet_r`.
      name: for `tfds`, like config.data.name.
      classes: a file with the names of the classes to test on, one per line; "" for all. With "",
        `tiny_imagenet_r` leaves out the classes that the training set lacks.
    """

    source: Annotated[str, one_of("", *SOURCES)] = ""
    path: str = ""
    split: Name = "test"
    name: str = ""
    classes: str = ""


@dataclasses.dataclass(frozen=True)
class MatchedSet:
    """A test set, OOD or not, whose classes are matched to those of a training set.

    Attributes:
      source: its examples; label i is its i-th class.
      data: settings for reading it: config.data with the set's own source, path and split.
      classes: for each of its classes, the label in the training set.
    """

    source: Source
    data: DataConfig
    classes: tuple[int, ...]


# Loaders name fields of config.data in their messages; these are the OOD set's own fields.
OWN_KEYS = {
    "config.data.train_split or config.data.test_split": "config.ood.split",
    "config.data.path": "config.ood.path",
    "config.data.source": "config.ood.source",
    "config.data.name": "config.ood.name",
}


def load_ood(data: DataConfig, ood: OodConfig, *, label_names: Sequence[str]) -> MatchedSet:
    """Loads the set of `ood`, which must name a source.

    Args:
      data: size, channels and other settings of its images.
      ood: where they are.
      label_names: names of the training set's classes.

    Raises:
      FileNotFoundError: no such path, split or class list.
      ValueError: the images do not fit config.data, or a class is not one of the training set's.
    """
    with renamed(OWN_KEYS), under("config.data"):
        own = dataclasses.replace(
            data,
            source=ood.source,
            path=ood.path,
            name=ood.name,
            test_split=ood.split,
            per_class=0,  # would apply if the split had the name of the training split
            test_per_class=0,
            test_share=0.0,
        )
        source = open_source(own, ood.split)
    source = choose_classes(source, ood, base_names=label_names)
    own = dataclasses.replace(own, labels=len(source.label_names))
    classes = match_classes(
        source.label_names,
        label_names,
        at=f"config.ood.source={ood.source!r}, path={ood.path!r}, split={ood.split!r}",
        way_out="Rename the folders to the training set's names (such as wnids), remove them, or "
        "set config.ood.source=''",
    )
    return MatchedSet(source, own, classes)


def choose_classes(source: Source, ood: OodConfig, *, base_names: Sequence[str]) -> Source:
    """Returns the examples of the classes that `ood` tests on; all examples if it names none.

    Raises:
      FileNotFoundError: no such class list.
      ValueError: the list is malformed or names a class that the set lacks.
    """
    names = source.label_names
    if ood.classes:
        selection = set(read_names(Path(os.path.expanduser(ood.classes))))
        if unknown := selection - set(names):
            raise ValueError(
                f"config.ood.classes={ood.classes!r} names {len(unknown)} classes that "
                f"config.ood.path={ood.path!r} lacks: {listed(unknown)}; correct the list or the "
                "path"
            )
    elif SOURCES[ood.source].shared_only:
        selection = set(names) & set(base_names)
        logging.info(
            "config.ood: %d of %d classes are the training set's", len(selection), len(names)
        )
    else:
        return source
    if not selection or len(selection) == len(names):
        return source  # match_classes raises an error if no class is shared
    old_labels = [label for label, name in enumerate(names) if name in selection]
    indices = np.flatnonzero(np.isin(source.labels, old_labels))
    labels = np.searchsorted(old_labels, source.labels[indices]).astype(np.int32)
    return Subset(source, indices, labels, tuple(names[label] for label in old_labels))
