"""Where the images come from: scikit-learn's digits, or a folder or zip, one class a folder.

A loader takes (config.data, split). It leaves it to `load_source` to hold the number of classes
against config.data.labels, since an OOD set has classes of its own number.
"""

import dataclasses
import functools
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from common_jax import inputs
from common_jax.config import did_you_mean
from common_jax.inputs import BadExample, Example
from m2mkd_jax.data import digits

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# Sources held decoded in memory, at the one size they have.
EMBEDDED = ("digits", "digits_r")
COLOUR_MODES = {1: "L", 3: "RGB"}
READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`config.data`: the images of a run.

    Attributes:
      source: a key of SOURCES.
      path: of `folder`: a directory SPLIT/CLASS/*.jpg, or an uncompressed zip of the same tree.
      image_size: side of the square that the model sees, in pixels.
      channels: 1 (grey) or 3 (RGB).
      labels: number of classes.
      mean, std: one number a channel, in units of the full range: (pixel / 255 - mean) / std.
      train_split, test_split: folder names under `path`; of `digits`: "train" and "test".
      workers: threads that decode; 0 decodes in the training thread.
      bad_share: share of the images that may be unreadable before the run stops.
    """

    source: str = "digits"
    path: str = ""
    image_size: int = 8
    channels: int = 1
    labels: int = 10
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    train_split: str = "train"
    test_split: str = "test"
    workers: int = 0
    bad_share: float = 0.001

    def __post_init__(self):
        if self.source not in SOURCES:
            hint = did_you_mean(self.source, SOURCES)
            raise ValueError(
                f"config.data.source={self.source!r} is none of {sorted(SOURCES)}{hint}"
            )
        if self.channels not in COLOUR_MODES:
            raise ValueError(f"config.data.channels={self.channels} must be 1 (grey) or 3 (RGB)")
        for key in ("image_size", "labels"):
            if getattr(self, key) < 1:
                raise ValueError(f"config.data.{key}={getattr(self, key)} must be at least 1")
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(
                    f"config.data.{key}={getattr(self, key)} must have one number for each of the "
                    f"config.data.channels={self.channels} channels"
                )
        if min(self.std) <= 0:
            raise ValueError(f"config.data.std={self.std} must be positive")
        if self.workers < 0:
            raise ValueError(
                f"config.data.workers={self.workers} must not be negative; 0 means none"
            )
        if not 0 <= self.bad_share < 1:
            raise ValueError(f"config.data.bad_share={self.bad_share} must be in [0, 1)")


@runtime_checkable
class Source(inputs.Source, Protocol):
    """Examples {"image": uint8 [I, J, Ch], "label": int32 []}."""

    @property
    def labels(self) -> np.ndarray:
        """[len] int32, known without reading an image."""
        ...

    @property
    def label_names(self) -> tuple[str, ...]:
        """The name of each class; a label is a place in it."""
        ...


def load_source(config: DataConfig, split: str) -> Source:
    """The images of one split (config.train_split or config.test_split).

    Raises:
      FileNotFoundError: no such path or split; the message says what is there.
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


def open_source(config: DataConfig, split: str) -> Source:
    """`load_source` of any number of classes; config.labels is not looked at."""
    return SOURCES[config.source](config, split)


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A set that stays decoded in memory: arrays {"image": [len, I, J, Ch], "label": [len]}."""

    arrays: dict[str, np.ndarray]
    label_names: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        return self.arrays["label"]

    def __len__(self) -> int:
        return len(self.arrays["label"])

    def __getitem__(self, index: int) -> Example:
        return {name: array[index] for name, array in self.arrays.items()}


def load_digits_source(config: DataConfig, split: str) -> ArraySource:
    """scikit-learn's handwritten digits: 1,437 images to train and 360 to test, 8 x 8 pixels, grey.

    The set's values 0 to 16 are stretched to 0 to 255, so that (pixel / 255 - mean) / std with mean
    = std = 0.5 gives [-1, 1] as for any image.

    Raises:
      ValueError: config.data asks for another size or channel count, or `split` is not train or
        test.
    """
    _require_embedded(config, split, splits=digits.SPLITS)
    images, labels = digits.load_split(split)
    return ArraySource({"image": images, "label": labels}, digits.NAMES)


def load_digits_r_source(config: DataConfig, split: str) -> ArraySource:
    """Renditions of the digits' test images, to test on what training has not shown (config.ood).

    Each is inverted, turned by 25 degrees to the left and to the right, thickened and thinned; 6
    and 9, which turning brings close to each other, are left out. That makes 286 images in 5
    renditions, of 8 classes, in the form that `digits` has.

    Raises:
      ValueError: config.data asks for another size or channel count, or `split` is not test.
    """
    _require_embedded(config, split, splits=("test",))
    images, labels = digits.load_renditions()
    return ArraySource({"image": images, "label": labels}, digits.RENDERED)


def _require_embedded(config: DataConfig, split: str, *, splits: Collection[str]) -> None:
    for key, value in (("image_size", digits.SIDE), ("channels", 1)):
        if getattr(config, key) != value:
            raise ValueError(
                f"config.data.{key}={getattr(config, key)} does not fit {config.source!r}, whose "
                f"images have {value}; set it to {value} or take another source"
            )
    if split not in splits:
        raise ValueError(
            f"{config.source!r} has no split {split!r}, only {sorted(splits)}; "
            "correct config.data.train_split or config.data.test_split, or take another "
            "config.data.source"
        )


@dataclasses.dataclass(frozen=True)
class DirectoryFiles:
    """The files of an image folder, by their path relative to `root`."""

    root: Path
    names: tuple[str, ...]

    def read(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()


class ZipFiles:
    """The stored (uncompressed) members of a zip, read by offset.

    Reading takes no lock and moves no file position, so threads share one descriptor; a pickled
    copy opens its own. The central directory, large for a million images, is parsed only once.
    """

    def __init__(self, root: Path, members: list[zipfile.ZipInfo]):
        self.root = root
        self.names = tuple(member.filename for member in members)
        self._places = np.array([(m.header_offset, m.file_size, m.CRC) for m in members], np.int64)
        self._file = root.open("rb")

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "_file"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._file = self.root.open("rb")

    def read(self, index: int) -> bytes:
        offset, size, checksum = (int(number) for number in self._places[index])
        # The local header repeats the name and may have another extra field than the directory's.
        header = os.pread(self._file.fileno(), 30, offset)
        skip = (
            30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        content = os.pread(self._file.fileno(), size, offset + skip)
        if len(content) != size or zlib.crc32(content) != checksum:
            raise OSError("its bytes in the zip do not match the checksum there")
        return content


class FolderSource:
    """Images of `SPLIT/CLASS/...`, decoded when asked for; classes are the folder names, sorted."""

    arrays = None

    def __init__(
        self,
        files: DirectoryFiles | ZipFiles,
        labels: np.ndarray,
        *,
        label_names: tuple[str, ...],
        channels: int,
    ):
        self.files = files
        self.labels = labels
        self.label_names = label_names
        self.channels = channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        """{"image": uint8 [I, J, Ch] at the file's own size, "label": int32}, or BadExample."""
        try:
            with Image.open(io.BytesIO(self.files.read(index))) as image:
                pixels = np.asarray(image.convert(COLOUR_MODES[self.channels]))
        except READ_ERRORS as error:
            name = f"{self.files.root}/{self.files.names[index]}"
            raise BadExample(name, f"{type(error).__name__}: {error}") from error
        return {
            "image": pixels.reshape(*pixels.shape[:2], self.channels),
            "label": self.labels[index],
        }


def load_folder_source(config: DataConfig, split: str) -> FolderSource:
    """The images below PATH/SPLIT/CLASS/, where PATH is a directory or a zip of the same tree.

    Raises:
      FileNotFoundError: no such path, split, or no image in it.
      ValueError: an empty class folder, a compressed or broken zip.
    """
    root = Path(config.path).expanduser()
    if not config.path or not root.exists():
        beside = f"; beside it: {listed(p.name for p in root.parent.iterdir())}"
        raise FileNotFoundError(
            f"config.data.path={config.path!r} does not exist; give the folder or zip that holds "
            f"SPLIT/CLASS/*.jpg{beside if config.path and root.parent.is_dir() else ''}"
        )
    find = _find_in_directory if root.is_dir() else _find_in_zip
    files, classes = find(root, split)
    at = f"config.data.path={config.path!r}, split {split!r}"
    if not files.names:
        raise FileNotFoundError(f"{at}: no image ({', '.join(IMAGE_SUFFIXES)}) in SPLIT/CLASS/")
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[name.split("/")[1]] for name in files.names], np.int32)
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise ValueError(f"{at}: no image for class {listed(empty)}; fill or remove the folder")
    return FolderSource(files, labels, label_names=tuple(classes), channels=config.channels)


def listed(names: Iterable[str]) -> str:
    """The first ten names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _missing_split(root: Path, split: str, present) -> FileNotFoundError:
    return FileNotFoundError(
        f"config.data.path={str(root)!r} has no split {split!r}, only: "
        f"{listed(present) or 'nothing'}; "
        "correct config.data.path, config.data.train_split or config.data.test_split"
    )


def _find_in_directory(root: Path, split: str) -> tuple[DirectoryFiles, list[str]]:
    top = root / split
    if not split or not top.is_dir():
        raise _missing_split(root, split, (p.name for p in root.iterdir() if p.is_dir()))
    classes = sorted(entry.name for entry in os.scandir(top) if entry.is_dir())
    names = []
    for folder, _, files in os.walk(top, followlinks=True):
        inside = Path(folder).relative_to(root).as_posix()
        if inside != split:
            names += [f"{inside}/{name}" for name in files if _is_image(name)]
    return DirectoryFiles(root, tuple(sorted(names))), classes


def _find_in_zip(root: Path, split: str) -> tuple[ZipFiles, list[str]]:
    try:
        with zipfile.ZipFile(root) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"config.data.path={str(root)!r} is neither a folder nor a whole zip ({error}); "
            "make the zip anew"
        ) from error
    members = [m for m in members if not m.filename.startswith("__MACOSX/")]
    inside = [m for m in members if m.filename.startswith(f"{split}/")] if split else []
    if not inside:
        raise _missing_split(root, split, {m.filename.split("/")[0] for m in members})
    deep = [m for m in inside if m.filename.count("/") >= 2]
    classes = sorted({m.filename.split("/")[1] for m in deep})
    images = sorted((m for m in deep if _is_image(m.filename)), key=lambda m: m.filename)
    packed = [m.filename for m in images if m.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(
            f"config.data.path={str(root)!r}: {listed(packed)} are compressed; images do not "
            "shrink and cannot be read by offset then: make the zip with `zip -0 -r`"
        )
    return ZipFiles(root, images), classes


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some examples of a source, in the order of `indices` [n], with labels [n] of their own."""

    source: Source
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


SOURCES: dict[str, Callable[[DataConfig, str], Source]] = {
    "digits": load_digits_source,
    "digits_r": load_digits_r_source,
    "folder": load_folder_source,
}
