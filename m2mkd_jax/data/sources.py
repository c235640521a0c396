"""Sources of images: embedded sets, folders and zips, tables, TFDS's ArrayRecords, and sets in
their own layouts.

A loader takes (config.data, split). It does not check the number of classes against
config.data.labels, since an OOD set has a different number; `load_source` does.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Protocol, runtime_checkable

import numpy as np

from common_jax import inputs
from common_jax.config import FieldError, Section
from common_jax.inputs import BadExample, Example
from common_jax.inputs.pictures import MODES
from common_jax.log import progress
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
from m2mkd_jax.data.folders import (
    FolderSource,
    SplitFiles,
    find_folder,
    find_tiny_imagenet,
)
from m2mkd_jax.data.listing import listed
from m2mkd_jax.data.own.tables import find_images, find_listed
from m2mkd_jax.data.records import RecordSource, find_inaturalist, load_records
from m2mkd_jax.data.subsets import first_of_each_class, share_of_each_class, with_labels_of

IN_MEMORY = ("auto", "always", "never")
# Limits up to which "auto" decodes a set into memory: image side, and bytes of all images.
MEMORY_SIDE = 64
MEMORY_BYTES = 256 * 2**20
CHUNK = 256  # images that a thread decodes at a time
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
    source = open_source(config, config.test_split)
    place = "".join(
        f", config.data.{key}={value!r}"
        for key, value in (("path", config.path), ("name", config.name))
        if value
    )
    at = f"config.data.source={config.source!r}{place}, split {config.test_split!r}"
    return with_labels_of(source, label_names, at=at)


def open_source(config: DataConfig, split: str) -> Source:
    """Like `load_source`, but for any number of classes: ignores config.labels."""
    # With a test share, the path is not split: both splits are drawn from all of it.
    source = SOURCES[config.source].load(config, "" if config.test_share else split)
    if config.test_share:
        source = share_of_each_class(
            source, config.test_share, seed=config.split_seed, test=split == config.test_split
        )
    counts = {config.test_split: config.test_per_class, config.train_split: config.per_class}
    if count := counts.get(split, 0):
        source = first_of_each_class(source, count)
    return decode_into_memory(source, config, split=split)


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


def decode_into_memory(source: Source, config: DataConfig, *, split: str) -> Source:
    """Decodes the source into memory if config.in_memory says so; otherwise returns it unchanged.

    Raises:
      ValueError: "always" with images of different sizes, or none of the first can be read.
    """
    if source.arrays is not None or config.in_memory == "never":
        return source
    at = f"config.data.source={config.source!r}, path={config.path!r}, split {split!r}"
    sample = (_read(source, index) for index in range(min(10, len(source))))
    first = next((example for example in sample if not isinstance(example, BadExample)), None)
    shape = (0, 0, 0) if first is None else first["image"].shape
    size = len(source) * int(np.prod(shape))
    fits = 0 < size <= MEMORY_BYTES and max(shape[:2]) <= MEMORY_SIDE
    if config.in_memory == "auto" and not fits:
        return source
    if first is None:
        raise ValueError(f"{at}: none of the first images can be read; repair or remove them")
    images, bad = np.zeros((len(source), *shape), np.uint8), {}

    def decode(start: int) -> tuple[int, ...] | None:
        """Decodes a chunk; returns the shape of an image if it differs, None if all are alike."""
        for index in range(start, min(start + CHUNK, len(source))):
            example = _read(source, index)
            if isinstance(example, BadExample):
                bad[index] = example
            elif example["image"].shape != shape:
                return example["image"].shape
            else:
                images[index] = example["image"]
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, len(source), CHUNK)
        shapes = progress(pool.map(decode, starts), total=len(starts), title=f"decoding {split}")
        other_shape = next((shape for shape in shapes if shape is not None), None)
        # `next` stops at the first image of another size, and leaves the rest undecoded.
        pool.shutdown(cancel_futures=True)
    if other_shape is None:
        logging.info("%s: %d images in memory, %.0f MiB", at, len(source), size / 2**20)
        names = source.label_names
        return DecodedSource(images, source.labels, label_names=names, bad=bad)
    if config.in_memory == "always":
        raise ValueError(
            f"{at}: config.data.in_memory='always' needs images of one size, but there are some of "
            f"{_pixels(shape)} and {_pixels(other_shape)} pixels; set it to 'auto' or resize the "
            "files"
        )
    return source


def _read(source: Source, index: int) -> Example | BadExample:
    try:
        return source[index]
    except BadExample as bad:
        return bad


def _pixels(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"


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
