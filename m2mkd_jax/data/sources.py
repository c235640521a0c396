"""Sources of images: embedded sets, folders and zips, tables, TFDS's ArrayRecords, and sets in
their own layouts.

A loader takes (config.data, split). It does not check the number of classes against
config.data.labels, since an OOD set has a different number; `load_source` does.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Annotated

from common_jax.config import FieldError, Section
from common_jax.inputs.names import naming_path
from common_jax.inputs.pictures import MODES
from common_jax.ranges import (
    BelowOne,
    Count,
    Finite,
    Name,
    Positive,
    Seed,
    Size,
    key_of,
    one_of,
    shown,
)
from m2mkd_jax.data import digits
from m2mkd_jax.data.augment import SMALL_SIDE
from m2mkd_jax.data.files.folders import (
    FolderSource,
    SplitFiles,
    find_folder,
    find_tiny_imagenet,
)
from m2mkd_jax.data.files.listing import listed
from m2mkd_jax.data.files.records import RecordSource, find_inaturalist, load_records
from m2mkd_jax.data.in_memory import IN_MEMORY, decode_into_memory
from m2mkd_jax.data.own.tables import find_images, find_listed
from m2mkd_jax.data.source import ArraySource, Source
from m2mkd_jax.data.subsets import first_of_each_class, share_of_each_class, with_labels_of

TINY_SIDE = 64


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """`config.data`: the images of a run.

    Attributes:
      source: a key of SOURCES.
      path: for `folder`: a directory SPLIT/CLASS/*.jpg, an uncompressed zip of the same tree, or a
        directory of SPLIT.zip; for `table`: a table of images with their classes, or a directory of
        SPLIT.csv; for `tfds`: the data_dir; for the others: the published folder.
      image_size: side of the model's square input, in pixels.
      channels: 1 (grey) or 3 (RGB).
      labels: number of classes.
      mean, std: one number per channel, relative to the full range: (pixel / 255 - mean) / std.
      train_split, test_split: folder names under `path`; for `digits`: "train" and "test"; for
        `tfds`: TFDS's split names; for `inaturalist`: names of json files, such as "train2018".
      test_share: for `folder` and `table`: share of every class to test on, if `path` is not split
        yet (PATH/CLASS/*.jpg, or one table); 0 if it is.
      split_seed: seed of the draw for test_share.
      workers: processes that read and decode images; 0 does it in the training process.
      bad_share: share of images that may be unreadable before the run stops.
      name: for `tfds`: the set in the data_dir, such as "imagenet2012"; "" if `path` is the folder
        of a prepared version itself.
      in_memory: whether to keep decoded images in memory: "always", "never", or "auto", if all
        have the same size of at most 64 x 64 pixels and take at most 256 MiB.
      per_class, test_per_class: images of each class to train and to test on, the first in the
        set's order; 0 for all. For experiments with less data.
    """

    source: Annotated[str, key_of(lambda: SOURCES)] = "digits"
    path: str = ""
    image_size: Size = 8
    channels: Annotated[int, one_of(*MODES)] = 1
    labels: Size = 10
    mean: tuple[Finite, ...] = (0.5,)
    std: tuple[Positive, ...] = (0.5,)
    train_split: Name = "train"
    test_split: Name = "test"
    test_share: BelowOne = 0.0
    split_seed: Seed = 0
    workers: Count = 0
    bad_share: BelowOne = 0.001
    name: str = ""
    in_memory: Annotated[str, one_of(*IN_MEMORY)] = "auto"
    per_class: Count = 0
    test_per_class: Count = 0

    def __post_init__(self):
        super().__post_init__()
        images = SOURCES[self.source]
        if self.name and not images.named:
            named = " or ".join(repr(name) for name, one in SOURCES.items() if one.named)
            raise FieldError(
                f"name={shown(self.name)} is for source={named}; {self.source!r} has no sets to "
                "choose from: leave it empty"
            )
        if self.test_share and not images.splittable:
            raise FieldError(
                f"test_share={self.test_share:g} is for the sources {', '.join(splittable())}; "
                f"{self.source!r} is already split: leave it out"
            )
        if self.test_share and self.train_split == self.test_split:
            raise FieldError(
                f"test_share={self.test_share:g} needs two names: train_split and test_split are "
                f"both {shown(self.test_split)}"
            )
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise FieldError(
                    f"{key}={shown(getattr(self, key))} must have one number for each of the "
                    f"channels={self.channels}"
                )


def load_source(config: DataConfig, split: str) -> Source:
    """Loads the images of one split (config.train_split or config.test_split).

    Raises:
      FileNotFoundError: no such path or split; the message lists those present.
      ImportError: `tfds` without its package.
      ValueError: config.data does not fit the data.
    """
    source, labels = open_source(config, split), config.labels
    if len(source.label_names) != labels:
        count = len(source.label_names)
        path = f", config.data.path={config.path!r}" if config.path else ""
        raise ValueError(
            f"config.data.labels={labels} does not fit config.data.source={config.source!r}{path}, "
            f"split {split!r}, which has {count} classes ({listed(source.label_names)}); "
            f"set config.data.labels={count} or correct the data"
        )
    return source


def load_test_source(config: DataConfig, label_names: Sequence[str]) -> Source:
    """Loads the images of config.test_split, labelled with the training set's classes.

    Args:
      config: config.data.
      label_names: the training set's classes; the test set may lack some but must have no others.

    Raises:
      FileNotFoundError, ImportError: like `load_source`.
      ValueError: like `load_source`, and for a class that the training set lacks.
    """
    warn_of_one_split(config)
    source = open_source(config, config.test_split)
    place = "".join(
        f", config.data.{key}={value!r}"
        for key, value in (("path", config.path), ("name", config.name))
        if value
    )
    at = f"config.data.source={config.source!r}{place}, split {config.test_split!r}"
    return with_labels_of(source, label_names, at=at)


def warn_of_one_split(config: DataConfig) -> None:
    """Warns if the test split is the training split, as it may be on purpose."""
    if config.test_split == config.train_split:
        logging.warning(
            "config.data.test_split=%r is also the training split: its accuracy is of images that "
            "the run has trained on",
            config.test_split,
        )


def open_source(config: DataConfig, split: str) -> Source:
    """Like `load_source`, but for any number of classes: ignores config.labels.

    Raises:
      FileNotFoundError, ImportError, ValueError: like `load_source`.
      OSError: a file or folder that cannot be read.
    """
    # With a test share, the path is not split: both splits are drawn from all of it.
    with naming_path(config.path):
        source = SOURCES[config.source].load(config, "" if config.test_share else split)
    if config.test_share:
        source = share_of_each_class(
            source, config.test_share, seed=config.split_seed, test=split == config.test_split
        )
    counts = {config.test_split: config.test_per_class, config.train_split: config.per_class}
    if count := counts.get(split, 0):
        source = first_of_each_class(source, count)
    at = f"config.data.source={config.source!r}, path={config.path!r}, split {split!r}"
    return decode_into_memory(source, config.in_memory, at=at, side=exact_side(config))


def exact_side(config: DataConfig) -> int | None:
    """The side that every image must have; None if images are resized, or known to have it."""
    fits = SOURCES[config.source].exact or config.image_size > SMALL_SIDE
    return None if fits else config.image_size


def load_digits_source(config: DataConfig, split: str) -> ArraySource:
    """Loads scikit-learn's handwritten digits: 1,437 training and 360 test images of 8 x 8 pixels,
    grey.

    The set's values 0 to 16 are scaled to 0 to 255, so (pixel / 255 - mean) / std with mean = std =
    0.5 gives [-1, 1], as for any image.

    Raises:
      ValueError: config.data has another size or channel count, or `split` is not train or test.
    """
    _require_embedded(config, split, splits=digits.SPLITS)
    images, labels = digits.load_split(split)
    return ArraySource({"image": images, "label": labels}, digits.NAMES)


def load_digits_r_source(config: DataConfig, split: str) -> ArraySource:
    """Loads renditions of the digits' test images in styles that training does not have
    (config.ood).

    Each image is inverted, rotated by 25 degrees to the left and to the right, thickened and
    thinned; 6 and 9, which rotation makes similar, are left out. That gives 286 images of 8
    classes, in 5 renditions each, in the same form as `digits`.

    Raises:
      ValueError: config.data has another size or channel count, or `split` is not test.
    """
    _require_embedded(config, split, splits=("test",))
    images, labels = digits.load_renditions()
    return ArraySource({"image": images, "label": labels}, digits.RENDERED)


def _require_embedded(config: DataConfig, split: str, *, splits: Collection[str]) -> None:
    if config.path:
        logging.warning(
            "config.data.path=%r is ignored: config.data.source=%r needs no files; for your own "
            "images set config.data.source to one of %s",
            *(config.path, config.source, ", ".join(splittable())),
        )
    for key, value in (("image_size", digits.SIDE), ("channels", 1)):
        if getattr(config, key) != value:
            raise ValueError(
                f"config.data.{key}={getattr(config, key)} does not fit {config.source!r}, whose "
                f"images have {value}; set it to {value} or use another source"
            )
    if split not in splits:
        raise ValueError(
            f"{config.source!r} has no split {split!r}, only {sorted(splits)}; "
            "correct config.data.train_split or config.data.test_split, or use another "
            "config.data.source"
        )


def load_files(
    config: DataConfig, split: str, *, find: Callable[[str, str], SplitFiles]
) -> FolderSource:
    """Loads the image files of a split, as listed by `find(path, split)`."""
    return _folder_source(find(config.path, split), config)


def load_imagenet_r_source(config: DataConfig, split: str) -> FolderSource:
    """Loads ImageNet-R in its published layout, PATH/WNID/*.jpg; its only split is called test."""
    _require_test(config, split)
    return _folder_source(find_folder(config.path, ""), config)


def load_tiny_imagenet_r_source(config: DataConfig, split: str) -> FolderSource:
    """Loads ImageNet-R with each picture resized to 64 x 64 pixels, the size of Tiny-ImageNet.

    `load_ood` keeps the 62 classes that Tiny-ImageNet shares; a folder with only these classes, at
    any image size, works too.
    """
    _require_test(config, split)
    return _folder_source(find_folder(config.path, ""), config, side=TINY_SIDE)


def load_tfds_source(config: DataConfig, split: str) -> RecordSource:
    """Loads a set that TFDS prepared as ArrayRecords (`load_records`)."""
    return load_records(config.path, config.name, split, channels=config.channels)


def _require_test(config: DataConfig, split: str) -> None:
    if split != "test":
        raise ValueError(
            f"{config.source!r} has no split {split!r}, only ['test'], to test on; correct "
            "config.data.train_split or config.data.test_split, or use another config.data.source"
        )


def _folder_source(
    split_files: SplitFiles, config: DataConfig, *, side: int | None = None
) -> FolderSource:
    return FolderSource(
        split_files.files,
        split_files.labels,
        label_names=split_files.label_names,
        channels=config.channels,
        side=side,
    )


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """An entry of SOURCES.

    Attributes:
      load: (config.data, split) -> its images, for any number of classes.
      exact: whether `load` refuses any other config.data.image_size than the images' own, so that
        evaluation neither resizes nor checks them.
      splittable: whether `test_share` can split it.
      named: whether config.data.name chooses one of several sets in config.data.path.
      shared_only: whether an OOD set leaves out classes that the training set lacks, instead of
        refusing them.
    """

    load: Callable[[DataConfig, str], Source]
    exact: bool = False
    splittable: bool = False
    named: bool = False
    shared_only: bool = False


SOURCES: dict[str, ImageSet] = {
    "digits": ImageSet(load_digits_source, exact=True),
    "digits_r": ImageSet(load_digits_r_source, exact=True),
    "folder": ImageSet(functools.partial(load_files, find=find_images), splittable=True),
    "table": ImageSet(functools.partial(load_files, find=find_listed), splittable=True),
    "tfds": ImageSet(load_tfds_source, named=True),
    "tiny_imagenet": ImageSet(functools.partial(load_files, find=find_tiny_imagenet)),
    "tiny_imagenet_r": ImageSet(load_tiny_imagenet_r_source, shared_only=True),
    "imagenet_r": ImageSet(load_imagenet_r_source),
    "inaturalist": ImageSet(functools.partial(load_files, find=find_inaturalist)),
}


def splittable() -> list[str]:
    """The sources that config.data.test_share can split."""
    return [name for name, images in SOURCES.items() if images.splittable]
