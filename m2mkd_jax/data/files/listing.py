"""Listing the image files of a directory by class, following links without loops or duplicates."""

import collections
import dataclasses
import errno
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from common_jax.inputs.names import listed as listed
from common_jax.inputs.names import printable as printable
from common_jax.inputs.pictures import SUFFIXES, read_file
from common_jax.inputs.pictures import is_hidden as is_hidden
from common_jax.inputs.pictures import is_image as is_image

IMAGE_SUFFIXES = SUFFIXES
# Files that may well lie among images.
NOT_IMAGES = ("", ".csv", ".db", ".ini", ".json", ".md", ".txt", ".xml")
DEEPEST = 32  # levels of nested folders below a class


@dataclasses.dataclass(frozen=True)
class DirectoryFiles:
    """The files of an image folder, by their path relative to `root` or their absolute path."""

    root: Path
    names: tuple[str, ...]

    def read(self, index: int) -> bytes:
        # Not `Path`, which would be 50 % slower.
        return read_file(os.path.join(self.root, self.names[index]))


def missing_split(root: Path, split: str, present: Iterable[str]) -> FileNotFoundError:
    """Returns the error for a `root` that has no `split`, only those `present`."""
    return FileNotFoundError(
        f"config.data.path={str(root)!r} has no split {split!r}, only: "
        f"{listed(present) or 'nothing'}; "
        "correct config.data.path, config.data.train_split or config.data.test_split"
    )


def require_class_folders(loose: list[str], classes: list[str], *, at: str) -> None:
    """Warns about `loose` images, which lie in the split itself and not in a class folder.

    Raises:
      ValueError: all images are loose, as in ILSVRC2012's published validation set.
    """
    if not loose:
        return
    if classes:
        logging.warning("%s: left out %d images that are in no class folder", at, len(loose))
        return
    raise ValueError(
        f"{at}: all {len(loose)} images lie in the split itself ({listed(loose[:2])}), and nothing "
        "tells their classes. List them in SPLIT.txt beside the folder, with a file and its class "
        "in each line; or move them into one folder per class, SPLIT/CLASS/, named like the "
        "training folders: for ILSVRC2012's val, valprep.sh of "
        "github.com/soumith/imagenetloader.torch does this; Kaggle's LOC_val_solution.csv also "
        "lists each file's class"
    )


def warn_of_other_files(names: Iterable[str], *, at: str) -> None:
    """Warns about files in class folders that may be images but have another suffix."""
    suffixes = (os.path.splitext(name)[1].lower() for name in names)
    counts = collections.Counter(suffix for suffix in suffixes if suffix not in NOT_IMAGES)
    if counts:
        logging.warning(
            "%s: left out %d files that are not named like images: %s; those are %s",
            at,
            sum(counts.values()),
            listed(f"{suffix} ({count})" for suffix, count in counts.most_common()),
            ", ".join(IMAGE_SUFFIXES),
        )


def find_in_directory(root: Path, split: str) -> tuple[DirectoryFiles, list[str], int]:
    """Returns (images, classes, position of the class among the parts of an image's path).

    Links to files and folders are followed. A folder that can be reached twice within its class is
    read only once, and one that contains the split itself is not read at all; both cause a warning.
    Hidden files and folders are left out. A broken link that is named like an image counts as one
    that cannot be read; others, which may have been folders, cause a warning.

    Raises:
      FileNotFoundError: no such split.
      ValueError: two classes that share a folder, a class name that is not UTF-8, no class folder.
      OSError: a folder that cannot be read.
    """
    top = root / split
    if not top.is_dir() or Path(split).is_absolute():
        raise missing_split(root, split, (p.name for p in root.iterdir() if p.is_dir()))
    at = f"config.data.path={str(root)!r}, split {split!r}"
    classes, loose, hidden, broken = [], [], [], []
    with os.scandir(top) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                hidden += [entry.name] * _is_folder(entry)
            elif _is_folder(entry):
                classes.append(entry.name)
            elif is_image(entry.name):
                loose.append(entry.name)
            elif _is_broken(entry):
                broken.append(entry.path)
    if hidden:
        logging.info("%s: left out hidden folders: %s", at, listed(hidden))
    classes.sort()
    require_class_folders(loose, classes, at=at)
    if odd := [name for name in classes if not _is_utf8(name)]:
        raise ValueError(
            f"{at}: class folders whose names are not UTF-8: {listed(odd)}; rename them"
        )
    walk = _Walk(os.path.realpath(top), at)
    # All class folders first, so that a link into another class is found whatever the order.
    for name in classes:
        walk.claim(os.path.realpath(top / name), name)
    prefix = f"{split}/" if split else ""
    names = [
        f"{prefix}{name}/{file}" for name in classes for file in walk.images(str(top / name), name)
    ]
    warn_of_other_files(walk.others, at=at)
    if broken := broken + walk.broken:
        logging.warning(
            "%s: left out %d links whose targets are missing, and which may be folders of images: "
            "%s; restore the targets or remove the links",
            *(at, len(broken), listed(broken)),
        )
    if walk.left_out:
        logging.warning(
            "%s: left out %d links to folders that were already read: %s",
            at,
            len(walk.left_out),
            listed(walk.left_out),
        )
    return DirectoryFiles(root, tuple(sorted(names))), classes, len(Path(split).parts)


class _Walk:
    """Walks through the images of each class; reads every real folder once and for one class only.

    Args:
      top: real path of the split.
      at: name of the split, for messages.
    """

    def __init__(self, top: str, at: str):
        self.left_out: list[str] = []
        self.others: list[str] = []  # files without an image suffix
        self.broken: list[str] = []  # links without one, whose targets are missing
        self._top = top
        self._at = at
        self._owner: dict[str, str] = {}  # class by the real path of a folder

    def claim(self, real: str, name: str) -> None:
        """Assigns a folder to class `name`; raises ValueError if it belongs to another class."""
        owner = self._owner.setdefault(real, name)
        if owner != name:
            raise ValueError(
                f"{self._at}: classes {owner!r} and {name!r} share the folder {printable(real)!r} "
                "by a link, so that an image would have two labels; remove one of the links"
            )

    def images(self, folder: str, name: str) -> Iterator[str]:
        """Yields the paths of the images of class `name` below `folder`, relative to it."""
        visited = set()
        # (path as the user sees it, real path, path below the class). Links come after all real
        # folders, so that names do not depend on the order of directory entries on the disk.
        waiting, links = [(folder, os.path.realpath(folder), "")], []
        while waiting or links:
            if not waiting:
                links.sort(reverse=True)
                waiting.append(links.pop())
            path, real, below = waiting.pop()
            if real in visited or self._holds_top(real):
                self.left_out.append(path)
                continue
            visited.add(real)
            self.claim(real, name)
            if below.count("/") > DEEPEST:
                raise ValueError(
                    f"{self._at}: {printable(path)[-200:]!r} lies more than {DEEPEST} folders deep"
                )
            with os.scandir(path) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    if _is_folder(entry):
                        inside, linked = os.path.join(real, entry.name), entry.is_symlink()
                        target = os.path.realpath(inside) if linked else inside
                        queue = links if linked else waiting
                        queue.append((entry.path, target, f"{below}{entry.name}/"))
                    elif is_image(entry.name):
                        yield below + entry.name
                    elif _is_broken(entry):
                        self.broken.append(entry.path)
                    else:
                        self.others.append(entry.name)

    def _holds_top(self, real: str) -> bool:
        return self._top == real or self._top.startswith(real.rstrip("/") + "/")


def _is_folder(entry: os.DirEntry) -> bool:
    """Returns True for a folder or a link to one; a link to itself is not a folder."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _is_broken(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
