"""Data sets whose labels are in records, not in folder names: TFDS's ArrayRecords and iNaturalist's
JSON.

Reading ArrayRecords needs the package tensorflow_datasets (`pip install -e '.[tfds]'`) but not
TensorFlow; preparing them needs both (tools/prepare_data.py).
"""

import hashlib
import io
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from common_jax.inputs import BadExample, Example
from common_jax.inputs.names import require_distinct
from common_jax.inputs.pictures import decode_picture, pixels_of
from common_jax.log import progress
from common_jax.untrusted import (
    RefusedError,
    as_id,
    as_text,
    brief,
    parse_json,
    read_npz,
    refuse_pointer,
)
from common_jax.workdir import write_bytes
from m2mkd_jax.data.files.folders import (
    SplitFiles,
    label_rows,
    require_filled,
    require_path,
)
from m2mkd_jax.data.files.listing import DirectoryFiles, listed

CHUNK = 256  # records that a thread reads at a time
SAMPLE = 2**16  # bytes of a file that go into its fingerprint
VERSION = re.compile(r"\d+\.\d+\.\d+")


class RecordSource:
    """Images of TFDS ArrayRecords, read and decoded on access.

    Attributes:
      folder: folder of the prepared set, with dataset_info.json and features.json.
      split: split in TFDS's notation, such as "train" or "train[:10%]".
      labels: [len] int32.
      label_names: class names of the feature `label`.
      shards: the files of the split.
    """

    arrays = None

    def __init__(self, folder: epath.Path, split: str, *, channels: int):
        self.folder = folder
        self.split = split
        self.channels = channels
        builder = open_builder(folder)
        instructions = _instructions(builder, folder, split)
        self.shards = tuple(str(part.filename) for part in instructions)
        # A split such as "train[:10%]" may start and stop inside a file. Only used in messages.
        self._skips = np.array([part.skip for part in instructions])
        self._ends = np.cumsum([part.take for part in instructions])
        if not self.shards:
            raise ValueError(f"{folder}, split {split!r} has no records; use another split")
        self.label_names = tuple(builder.info.features["label"].names)
        self._opened: tuple[int, Any] | None = None
        self.labels = _split_labels(builder, folder, split)

    def __getstate__(self) -> dict:
        # Open readers cannot be pickled; each worker process opens its own.
        return vars(self) | {"_opened": None}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        """Returns the file and record number of image `index`, for messages."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        return f"{self.shards[shard]}, record {index - before + int(self._skips[shard])}"

    def __getitem__(self, index: int) -> Example:
        """Returns {"image": uint8 [I, J, X] at its own size, "label": int32}.

        Raises:
          BadExample: a record that cannot be read.
        """
        return {"image": pixels_of(self.picture(index)), "label": self.labels[index]}

    def picture(self, index: int) -> Image.Image:
        """Returns the decoded PIL image without copying its pixels; raises BadExample."""
        try:
            content = self._records[index]["image"]
            # array_record returns None for records past the end of a truncated file.
            return decode_picture(content or b"", self.channels)
        except (RuntimeError, OSError, ValueError) as error:
            raise BadExample(self.name(index), f"{type(error).__name__}: {error}") from error

    @property
    def _records(self) -> Any:
        # Readers have their own threads, which a forked process does not inherit.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), _open_records(open_builder(self.folder), self.split)
        return self._opened[1]


def load_records(path: str, name: str, split: str, *, channels: int) -> RecordSource:
    """Opens a split of a set that TFDS prepared as ArrayRecords.

    Its labels are read from `labels-SPLIT.npz` in the set's folder, which tools/prepare_data.py
    writes. If the file is missing or belongs to other records, all records are read once to write
    it, unless the folder is read-only.

    Args:
      path: TFDS's data_dir, or the folder of a prepared version if `name` is empty.
      name: name of the set in the data_dir, such as "imagenet2012", "imagenet2012:5.1.0" or
        "cifar10_1/v4"; without a version, the latest one is used.
      split: split in TFDS's notation.
      channels: 1 (grey) or 3 (RGB).

    Raises:
      ImportError: no tensorflow_datasets.
      FileNotFoundError: no such folder, set, version or split; the message lists those present.
      ValueError: no ArrayRecords, no image or label; labels out of range, empty classes.
    """
    folder = find_prepared(path, name)
    source = RecordSource(folder, split, channels=channels)
    at = f"{folder}, split {split!r}"
    require_distinct(source.label_names, at=f"{folder}, names of the feature label")
    places = set(range(len(source.label_names)))
    present = set(source.labels.tolist())
    # A part of a split may lack some classes; a label out of range is not a subset and is refused.
    if "[" in split and present < places:
        logging.warning("%s has no image for %d classes", at, len(places - present))
    else:
        require_filled(source.labels, source.label_names, at=at, way_out="use another split")
    return source


def find_prepared(path: str, name: str) -> epath.Path:
    """Returns the folder of a prepared version; takes the arguments of `load_records`.

    Raises:
      FileNotFoundError: no such folder.
    """
    root = epath.Path(path).expanduser()
    base, _, version = name.partition(":")
    folder = root / base if base else root
    way_out = (
        f"prepare it with `python tools/prepare_data.py {name or 'NAME'} --data-dir {path}`, or "
        "correct config.data.path and config.data.name"
    )
    if not path or not folder.is_dir():
        present = _folders(root) if path and root.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"config.data.path={path!r} has no set config.data.name={name!r} (there: {present}); "
            f"{way_out}"
        )
    if version:
        folder /= version
    elif not (folder / "dataset_info.json").exists():
        versions = [entry.name for entry in folder.iterdir() if VERSION.fullmatch(entry.name)]
        if versions:
            # Compared as numbers: 10.0.0 comes after 2.0.0.
            folder /= max(versions, key=lambda text: [int(part) for part in text.split(".")])
    if not (folder / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"{folder} is not a prepared set: it has no dataset_info.json (there: "
            f"{_folders(folder if folder.is_dir() else folder.parent)}); {way_out}"
        )
    return folder


def _folders(folder: epath.Path) -> str:
    return listed(entry.name for entry in folder.iterdir() if entry.is_dir()) or "no folder"


def open_builder(folder: epath.Path) -> Any:
    """Returns TFDS's builder for a prepared set, which must have the features `image` and `label`.

    Raises:
      ImportError: no tensorflow_datasets.
      ValueError: other features or another file format.
    """
    try:
        import tensorflow_datasets as tfds  # an extra, and slow to import
    except ImportError as error:
        raise ImportError(
            "config.data.source='tfds' needs the package tensorflow_datasets: "
            "pip install -e '.[tfds]', or use config.data.source='folder'"
        ) from error
    try:
        builder = tfds.builder_from_directory(os.fspath(folder))
        features = builder.info.features
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
    # On damaged files tfds may raise almost anything: protobuf's, json's or its own exceptions.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder} cannot be opened as a TFDS set ({reason:.500}); prepare it again"
        ) from error
    if (kinds.get("image"), kinds.get("label")) != ("Image", "ClassLabel"):
        raise ValueError(
            f"{folder} has the features {kinds}, but needs image: Image and label: ClassLabel. "
            "Choose another set as config.data.name"
        )
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{folder} was prepared as {builder.info.file_format.value}, which has no random "
            f"access; prepare it as ArrayRecords: python tools/prepare_data.py "
            f"{builder.info.name} --data-dir DIR"
        )
    return builder


def _instructions(builder: Any, folder: epath.Path, split: str) -> list[Any]:
    try:
        return builder.info.splits[split].file_instructions
    except (ValueError, KeyError, AssertionError) as error:
        raise FileNotFoundError(
            f"{folder} has no split {split!r}, only: {listed(builder.info.splits)}, and parts of "
            "them such as 'train[:10%]'; correct config.data.train_split or config.data.test_split"
        ) from error


def _open_records(builder: Any, split: str) -> Any:
    """Returns a sequence of {"image": bytes, "label": int}, with encoded images."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    # All images stay encoded, masks too: PIL decodes the ones that are needed, as in other sources.
    images = [name for name in features if isinstance(features[name], tfds.features.Image)]
    decoders = {name: tfds.decode.SkipDecoding() for name in images}
    return builder.as_data_source(split, decoders=decoders)


def _split_labels(builder: Any, folder: epath.Path, split: str) -> np.ndarray:
    """Returns the labels [n] int32 of a split or a part of one."""
    import tensorflow_datasets as tfds

    # Labels are stored per whole split, so that slices, and sums of slices, can reuse them.
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    whole = {part.splitname for part in parts}
    labels = {name: stored_labels(builder, folder, name) for name in whole}
    return np.concatenate([labels[part.splitname][part.from_ : part.to] for part in parts])


def stored_labels(builder: Any, folder: epath.Path, split: str) -> np.ndarray:
    """Returns the labels [n] int32 of a whole split, and caches them for the next call.

    They are read from `labels-SPLIT.npz`; if that is missing or outdated, they are read from all
    records once and written there.

    Raises:
      FileNotFoundError: files of the split that are missing.
      ValueError: a record that cannot be read, and whose label is therefore unknown.
    """
    paths = builder.info.splits[split].filepaths
    missing = [os.fspath(path) for path in paths if not epath.Path(path).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder}, split {split!r}: {len(missing)} of {len(paths)} files are missing: "
            f"{listed(missing)}; copy or prepare the set again"
        )
    # All names and sizes, and the first bytes of two files, identify the records well enough;
    # opening every file would be slow in an object store.
    shards = [(path.name, path.stat().length) for path in map(epath.Path, paths)]
    digest = hashlib.sha256(json.dumps(shards).encode())
    for path in (paths[0], paths[-1]):
        with epath.Path(path).open("rb") as file:
            digest.update(file.read(SAMPLE))
    fingerprint = digest.hexdigest()
    file = folder / f"labels-{split}.npz"
    if file.exists():
        labels = _load_labels(file, fingerprint, size=builder.info.splits[split].num_examples)
        if labels is not None:
            return labels
    labels = _read_labels(builder, split)
    content = io.BytesIO()
    np.savez(content, labels=labels, fingerprint=fingerprint)
    try:
        write_bytes(file, content.getvalue())
    except OSError as error:
        logging.warning(
            "%s cannot be written (%s), so every run has to read all labels first", file, error
        )
    return labels


def _load_labels(file: epath.Path, fingerprint: str, *, size: int) -> np.ndarray | None:
    """Returns the labels [size] int32 in a file of `stored_labels`.

    Returns None, with a warning, if it belongs to other records or is damaged.
    """
    try:
        stored = read_npz(file, ("fingerprint", "labels"))
        if str(stored["fingerprint"]) != fingerprint:
            logging.warning("%s belongs to other records and will be made again", file)
            return None
        labels = stored["labels"]
        if labels.shape != (size,) or labels.dtype != np.int32:
            raise ValueError(f"labels are {labels.dtype} {brief(labels.shape)}")
    except (OSError, ValueError) as error:
        logging.warning("%s cannot be read (%s) and will be made again", file, error)
        return None
    return labels


def _read_labels(builder: Any, split: str) -> np.ndarray:
    records, size = _open_records(builder, split), builder.info.splits[split].num_examples

    def read(start: int) -> list[int]:
        numbers = range(start, min(start + CHUNK, size))
        try:
            # One call per chunk, which the reader spreads over its own threads.
            labels = [record["label"] for record in records.__getitems__(list(numbers))]
        except RuntimeError as error:
            raise ValueError(_unreadable(builder, split, numbers, str(error))) from error
        if None in labels:  # what array_record returns past the end of a truncated file
            raise ValueError(_unreadable(builder, split, numbers, "records without a label"))
        return labels

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = pool.map(read, range(0, size, CHUNK))
        title = f"labels of {builder.info.full_name} {split}"
        chunks = progress(chunks, total=-(-size // CHUNK), title=title)
        return np.array([label for chunk in chunks for label in chunk], np.int32)


def _unreadable(builder: Any, split: str, numbers: range, reason: str) -> str:
    whole = builder.info.splits[split]
    # Only the files of these records: a set may have a thousand.
    first, last = np.searchsorted(
        np.cumsum(whole.shard_lengths), (numbers.start, numbers.stop - 1), side="right"
    )
    return (
        f"{builder.info.full_name}, split {split!r}, records {numbers.start} to "
        f"{numbers.stop - 1}: {reason}. Copy or prepare the files again: "
        f"{listed(os.fspath(path) for path in whole.filepaths[first : last + 1])}"
    )


def find_inaturalist(path: str, split: str) -> SplitFiles:
    """Lists the images of iNaturalist 2018 or 2019 in its published layout.

    That is `SPLITyear.json` with images, annotations and categories, and image files at its
    `file_name`s, relative to PATH. Labels are the ranks of the category ids. A missing image raises
    BadExample on access.

    Args:
      path: the folder of the set.
      split: the name of a JSON file without its suffix, such as "train2018", or just "train" or
        "val" if the folder has a single year.

    Raises:
      FileNotFoundError: no such path or file.
      ValueError: the file is not such JSON, refers to labels or images that it lacks, or gives an
        id to two images or an image two labels.
    """
    root = require_path(path, "the folder that holds train2018.json or train2019.json")
    source = _inaturalist_json(root, split)
    content = source.read_bytes()
    refuse_pointer(source, content)
    try:
        record = parse_json(content)
        categories = sorted((as_id(item["id"]), str(item["name"])) for item in record["categories"])
        images = {(as_id(item["id"]), as_text(item["file_name"])) for item in record["images"]}
        pairs = [
            (as_id(item["image_id"]), as_id(item["category_id"])) for item in record["annotations"]
        ]
    except RefusedError as refused:
        raise ValueError(f"{source} {refused}; download it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source} is not a complete file with images (id, file_name), annotations (image_id, "
            f"category_id) and categories (id, name): {type(error).__name__} {error!s:.200}; "
            "download it again. A test set without annotations cannot be evaluated"
        ) from error
    require_distinct((name for _, name in categories), at=str(source))
    require_distinct((str(number) for number, _ in categories), at=f"{source}, category ids")
    require_distinct((str(image) for image, _ in images), at=f"{source}, image ids")
    files = dict(images)
    unknown = [str(image) for image, _ in pairs if image not in files]
    if unknown:
        raise ValueError(f"{source}: annotations of images that it lacks: {listed(unknown)}")
    # Sorted by file, so that a seed selects the same images whatever the order in the JSON. An
    # image may be annotated twice with the same class.
    rows = sorted({(files[image], label) for image, label in pairs}, key=lambda row: row[0])
    places = (os.path.normpath(name) for name, _ in rows)
    require_distinct(places, at=f"{source}, files with several classes or ids")
    labels = label_rows(rows, [number for number, _ in categories], at=str(source))
    names = tuple(name for _, name in categories)
    require_filled(labels, names, at=str(source), way_out="remove the category from the file")
    return SplitFiles(DirectoryFiles(root, tuple(name for name, _ in rows)), labels, names)


def _inaturalist_json(root: Path, split: str) -> Path:
    exact = root / f"{split}.json"
    if exact.is_file():
        return exact
    years = sorted(root.glob(f"{split}20[0-9][0-9].json")) if split else []
    if len(years) != 1:
        present = listed(file.name for file in root.glob("*.json")) or "no json"
        problem = "several years, name one of them" if years else "no such file"
        raise FileNotFoundError(
            f"config.data.path={str(root)!r}, split {split!r}: {problem} (there: {present}); set "
            "config.data.train_split or config.data.test_split to a file's name without .json, "
            "such as train2018"
        )
    return years[0]
