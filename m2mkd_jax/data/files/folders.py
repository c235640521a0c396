"""Image files in folders and zips, one folder per class, and Tiny-ImageNet with its lists.

Splits are listed without reading any image. Messages name the location as `config.data.path`.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common_jax.inputs import BadExample, Example
from common_jax.inputs.names import require_distinct
from common_jax.inputs.pictures import decode_picture, pixels_of
from common_jax.untrusted import refuse_pointer
from m2mkd_jax.data.files.listing import (
    IMAGE_SUFFIXES,
    DirectoryFiles,
    find_in_directory,
    listed,
    printable,
)
from m2mkd_jax.data.files.zips import ZipFiles, find_in_zip

Files = DirectoryFiles | ZipFiles


class FolderSource:
    """Image files with labels, decoded on access.

    Attributes:
      side: resizes each whole picture to a square of this side (bicubic) unless it already has that
        size; None leaves pictures as they are.
    """

    arrays = None

    def __init__(
        self,
        files: Files,
        labels: np.ndarray,
        *,
        label_names: tuple[str, ...],
        channels: int,
        side: int | None = None,
    ):
        self.files = files
        self.labels = labels
        self.label_names = label_names
        self.channels = channels
        self.side = side

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns the path of image `index`, for messages."""
        return printable(os.path.join(self.files.root, self.files.names[index]))

    def __getitem__(self, index: int) -> Example:
        """Returns {"image": uint8 [I, J, X] at the file's own size, "label": int32}.

        Raises:
          BadExample: an image that cannot be read.
        """
        return {"image": pixels_of(self.picture(index)), "label": self.labels[index]}

    def picture(self, index: int) -> Image.Image:
        """Returns the decoded PIL image without copying its pixels; raises BadExample."""
        try:
            picture = decode_picture(self.files.read(index), self.channels)
        except (OSError, ValueError) as error:
            raise BadExample(self.name(index), f"{type(error).__name__}: {error}") from error
        if self.side is not None and picture.size != (self.side, self.side):
            picture = picture.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return picture


@dataclasses.dataclass(frozen=True)
class SplitFiles:
    """The image files of a split; `labels` [n] int32 are indices into `label_names`."""

    files: Files
    labels: np.ndarray
    label_names: tuple[str, ...]


def find_folder(path: str, split: str) -> SplitFiles:
    """Lists the images below PATH/SPLIT/CLASS/; classes are the folder names, sorted.

    PATH is a directory, an uncompressed zip of the same tree, or a directory of such zips,
    PATH/SPLIT.zip, with SPLIT/CLASS/ or CLASS/ inside. An empty `split` means PATH/CLASS/.

    Raises:
      FileNotFoundError: no such path or split, or no image in it.
      ValueError: an empty class folder, images without class folders, classes that share a folder,
        a compressed or broken zip.
    """
    root = require_path(path, "the folder or zip that holds SPLIT/CLASS/*.jpg")
    split = "/".join(Path(split).parts)  # a prefix of file names, without a trailing slash
    packed = root / f"{split}.zip"
    if root.is_dir() and not (root / split).is_dir() and packed.is_file():
        root = packed
    find = find_in_directory if root.is_dir() else find_in_zip
    files, classes, depth = find(root, split)
    at = f"config.data.path={path!r}, split {split!r}"
    if not files.names:
        raise FileNotFoundError(f"{at}: no image ({', '.join(IMAGE_SUFFIXES)}) in SPLIT/CLASS/")
    warn_of_numbers(classes, at=at)
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[name.split("/")[depth]] for name in files.names], np.int32)
    require_filled(labels, classes, at=at, way_out="fill or remove the folder")
    return SplitFiles(files, labels, tuple(classes))


def find_tiny_imagenet(path: str, split: str) -> SplitFiles:
    """Lists the images of Tiny-ImageNet-200 in its published layout.

    That is `wnids.txt`, `train/WNID/images/*.JPEG`, `val/images/*.JPEG` and
    `val/val_annotations.txt`; classes are the wnids, sorted. An annotated file that is missing
    raises BadExample on access.

    Raises:
      FileNotFoundError: no such path, or a missing list.
      ValueError: a split other than train and val, a class that wnids.txt lacks, or a duplicate.
    """
    root = require_path(path, "the folder tiny-imagenet-200 that holds wnids.txt")
    if split not in ("train", "val"):
        raise ValueError(
            f"'tiny_imagenet' has no split {split!r} with labels, only train and val; correct "
            "config.data.train_split or config.data.test_split"
        )
    # Sorted, since the published list is not: labels are then those of a folder with the same
    # classes.
    wnids = sorted(read_names(root / "wnids.txt"))
    if split == "train":
        files, folders, _ = find_in_directory(root, split)
        rows = [(name, name.split("/")[1]) for name in files.names]
        missing = sorted(set(wnids) - set(folders))
        if missing:
            raise FileNotFoundError(
                f"{root / split} has no folder for {len(missing)} of the {len(wnids)} classes of "
                f"wnids.txt: {listed(missing)}; unpack tiny-imagenet-200.zip again"
            )
    else:
        rows = _read_annotations(root / split)
    labels = label_rows(rows, wnids, at=f"{root / 'wnids.txt'}, which lacks classes of {split!r}")
    require_filled(labels, wnids, at=f"{root}, split {split!r}", way_out="unpack it again")
    return SplitFiles(DirectoryFiles(root, tuple(name for name, _ in rows)), labels, tuple(wnids))


def _read_annotations(folder: Path) -> list[tuple[str, str]]:
    """Returns (file, wnid) of each line of val_annotations.txt, sorted."""
    path, rows = folder / "val_annotations.txt", []
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; unpack tiny-imagenet-200.zip again, or, where the images were "
            "sorted into val/CLASS/, set config.data.source='folder'"
        )
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise ValueError(f"{path}, line {number} must have FILE, tab, WNID; it is {line!r}")
        rows.append((f"{folder.name}/images/{fields[0]}", fields[1]))
    require_distinct((name for name, _ in rows), at=str(path))
    return sorted(rows)


def label_rows(rows: Sequence[tuple[str, object]], classes: Sequence, *, at: str) -> np.ndarray:
    """Returns for each row (file, class) the index of its class in `classes`, [n] int32.

    Raises:
      ValueError: a class that is not among them.
    """
    place = {name: label for label, name in enumerate(classes)}
    unknown = sorted({str(name) for _, name in rows if name not in place})
    if unknown:
        raise ValueError(
            f"{at}: labels that are not among its {len(classes)} classes: {listed(unknown)}; "
            "correct the list or the labels"
        )
    return np.array([place[name] for _, name in rows], np.int32)


def warn_of_numbers(classes: Sequence[str], *, at: str) -> None:
    """Warns about sorted `classes` that are numbers in another order than that of the numbers."""
    if all(map(str.isdecimal, classes)) and len(set(map(len, classes))) > 1:
        largest = max(classes, key=int)
        logging.warning(
            "%s: classes are numbers, but are sorted as text, so %r has label %d; weights from "
            "elsewhere may number them otherwise: pad the numbers with zeros",
            *(at, largest, classes.index(largest)),
        )


def require_filled(labels: np.ndarray, classes: Sequence[str], *, at: str, way_out: str) -> None:
    """Raises ValueError if a class has no image, or a label has no class."""
    outside = np.unique(labels[(labels < 0) | (labels >= len(classes))])
    if len(outside):
        raise ValueError(
            f"{at}: labels {outside[:10].tolist()} are not from 0 to {len(classes) - 1}; a split "
            "without labels, such as a challenge's test split, cannot be used"
        )
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise ValueError(f"{at}: no image for class {listed(empty)}; {way_out}")


def read_names(path: Path) -> list[str]:
    """Returns the names in a class list with one name per line; empty lines are skipped.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not UTF-8, no name, or a name that occurs twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}, the list of class names, is missing")
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path} has no class names; expected one name per line")
    require_distinct(names, at=str(path))
    return names


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file; raises ValueError if it is not UTF-8, or a git-lfs
    pointer."""
    content = path.read_bytes()
    refuse_pointer(path, content)
    try:
        # Skips the byte order mark that some editors write.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert the file, for "
            "example with iconv"
        ) from error


def require_path(path: str, what: str) -> Path:
    """Returns `path`; raises FileNotFoundError, asking for `what`, if it does not exist."""
    root = Path(os.path.expanduser(path))
    if not path:
        raise FileNotFoundError(f"config.data.path={path!r} is empty; give {what}")
    if not os.path.exists(root):
        parent = next(folder for folder in root.absolute().parents if folder.is_dir())
        entries = listed(p.name for p in parent.iterdir()) or "nothing"
        where = "beside it" if parent == root.absolute().parent else f"in {str(parent)!r}"
        raise FileNotFoundError(
            f"config.data.path={path!r} does not exist; give {what}; {where}: {entries}"
        )
    return root
