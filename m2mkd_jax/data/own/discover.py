"""Guessing the settings of config.data from the images at a path, for users who give only the
path."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common_jax.inputs import BadExample
from common_jax.inputs.tables import SPLIT, find_table, is_table, read_table, table_names
from m2mkd_jax.data.files.listing import is_hidden, is_image
from m2mkd_jax.data.source import Source
from m2mkd_jax.data.sources import DataConfig, open_source
from m2mkd_jax.data.transforms import SMALL_SIDE

# Usual names of splits, the likeliest first.
TRAIN = ("train", "training")
TEST = ("test", "val", "valid", "validation", "testing", "dev")
SHARE = 0.2  # share to test on of a set without splits
SIDE = 64  # side of the network's input, if a config for small images meets larger ones
SAMPLE = 100  # images to look at


def settings_of(path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of config.data for training on the images at `path`; {} if there are none.

    Args:
      path: a folder, a zip or a table.
      given: the config.data to start from; its splits, size, mean and std are kept if they fit.

    Raises:
      FileNotFoundError, ValueError: the images cannot be listed.
    """
    layout = _layout(Path(path).expanduser(), given)
    if not layout:
        return {}
    anything = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3, "in_memory": "never"}
    layout = {"path": path} | layout
    config = DataConfig(**layout, **anything)
    source = open_source(config, config.train_split)
    images = _sample(source)
    settings = {**layout, "labels": len(source.label_names)}
    if not images:
        return settings
    sides = {side for image in images for side in image.shape[:2]}
    size = given["image_size"]
    if len(sides) == 1 and max(sides) <= SMALL_SIDE:  # such images are not resized
        (size,) = sides
    elif size <= SMALL_SIDE:
        size = SIDE
    grey = all(np.array_equal(image, image[:, :, :1].repeat(3, axis=2)) for image in images)
    channels = 1 if grey else 3
    settings |= {"image_size": size, "channels": channels}
    fits = given["channels"] == channels
    pixels = np.concatenate([image.reshape(-1, 3) for image in images])[:, :channels] / 255
    measured = {"mean": pixels.mean(axis=0), "std": np.maximum(pixels.std(axis=0), 0.001)}
    for key, numbers in measured.items():
        settings[key] = tuple(given[key] if fits else (round(float(x), 3) for x in numbers))
    return settings


def _layout(root: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns source and splits; if only a training split is found, its path and a share of it to
    test on."""
    share = {"test_share": given["test_share"] or SHARE}
    if root.is_file():
        if not is_table(root):
            return {"source": "folder"} | {key: given[key] for key in ("train_split", "test_split")}
        splits = {row[SPLIT] for _, row in read_table(root).rows if row.get(SPLIT)}
        return {"source": "table"} | (_splits(splits, given) or share)
    if not root.is_dir():
        return {}
    if (root / "wnids.txt").is_file():
        return {"source": "tiny_imagenet", "train_split": "train", "test_split": "val"}
    years = sorted(root.glob("train20[0-9][0-9].json"))
    for path in sorted(years, key=lambda path: path.stem != given["train_split"]):
        test = f"val{path.stem.removeprefix('train')}"
        if (root / f"{test}.json").is_file():
            return {"source": "inaturalist", "train_split": path.stem, "test_split": test}
    tables = table_names(root)
    folders = {entry.name for entry in root.iterdir() if entry.is_dir()}
    folders = {name for name in folders if not is_hidden(name)}
    packed = {path.stem for path in root.glob("*.zip")}
    for source, names in (("table", tables), ("folder", folders | packed)):
        if splits := _splits(names, given):
            return {"source": source} | splits
    if train := _likely(tables, given["train_split"], TRAIN):
        return {"source": "table", "path": str(find_table(root, train[0]))} | share
    if train := _likely(folders, given["train_split"], TRAIN):
        return {"source": "folder", "path": str(root / train[0])} | share
    if any(is_image(path.name) for name in folders for path in (root / name).iterdir()):
        return {"source": "folder"} | share
    if any(is_image(entry.name) for entry in root.iterdir()):
        raise ValueError(
            f"{root} has images but no class folders; move them into one folder per class, or "
            "list them in a table with the columns path and label"
        )
    return {}


def _splits(names: Collection[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the names of the splits; {} unless there are both a training and a test split."""
    train = _likely(names, given["train_split"], TRAIN)
    test = _likely(names, given["test_split"], TEST)
    return {"train_split": train[0], "test_split": test[0]} if train and test else {}


def _likely(names: Collection[str], given: str, usual: Sequence[str]) -> list[str]:
    """Returns the names that are `given` or usual, ignoring case, the likeliest first."""
    found = {name.lower(): name for name in sorted(names)}
    return [found[name] for name in (given.lower(), *usual) if name in found]


def _sample(source: Source) -> list[np.ndarray]:
    images = []
    for place in np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(int):
        try:
            images.append(source[int(place)]["image"])
        except BadExample:
            continue  # counted when the set itself is checked
    return images
