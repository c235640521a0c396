"""Checks of the content of a checkpoint's folder that read no parameters."""

import asyncio
import collections
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from common_jax.workdir import read_json

# The item with the checkpoint's run and step, {"id": the run's id in run.json, "step": the step}.
MARK = "run"
JSON = "metadata"  # orbax's name for the file of a JSON item
# Whatever orbax, tensorstore or the system may raise, in this thread or another.
FAILURES = (Exception, asyncio.CancelledError)

Outline = dict[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype by orbax's array name


@dataclasses.dataclass(frozen=True)
class Mark:
    """A checkpoint's run and step, independent of its folder's name."""

    id: str
    step: int


def read_mark(step: epath.Path) -> Mark | None:
    """Reads the mark in a step's folder; None if there is none, as in earlier versions. Raises
    ValueError or OSError if the mark cannot be read."""
    if not (step / MARK).exists():
        return None
    path = step / MARK / JSON
    content = read_json(path)
    run_id, number = content.get("id"), content.get("step")
    if not isinstance(run_id, str) or type(number) is not int:
        raise ValueError(f"{path} must hold a run's id and a step, not {str(content)[:200]}")
    return Mark(run_id, number)


def read_stored_step(step: epath.Path) -> int:
    """Reads the step counter of a checkpoint's state. Raises one of FAILURES if it cannot."""
    spec = {"driver": "zarr", "kvstore": {**_kvstore(step / "trainer"), "path": "step/"}}
    return int(ts.open(spec, open=True, read=True).result().read().result())


def outline(tree: Any) -> Outline:
    """Returns the shapes and dtypes of a tree's arrays, by orbax's names for them."""
    leaves = _by_name(tree).items()
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves}


def check_written(
    folder: epath.Path, arrays: Mapping[str, Outline], texts: Mapping[str, Any]
) -> None:
    """Checks a written step without reading an array: the shape, dtype and number of chunks of
    every array, and every JSON value. Raises OSError, naming what is missing or differs.

    Args:
      folder: a step's folder.
      arrays: expected content of each item with arrays.
      texts: expected content of each JSON item.
    """
    for item, value in texts.items():
        # Compared as text, where NaN equals itself.
        if json.dumps(read_json(folder / item / JSON)) != json.dumps(value):
            raise OSError(f"its item {item!r} reads back with other content")
    for item, expected in arrays.items():
        _check_item(folder / item, expected)


def _check_item(folder: epath.Path, expected: Outline) -> None:
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        keys = ts.KvStore.open(_kvstore(folder)).result().list().result()
    except FAILURES as error:
        raise OSError(f"its item {folder.name!r} cannot be read: {str(error)[:300]}") from error
    # Skips the placeholders of empty nodes.
    stored = {name: leaf for name, leaf in _by_name(tree).items() if hasattr(leaf, "shape")}
    parts = (key.decode().rpartition("/") for key in keys)
    # Keys with a dot, such as .zarray, hold an array's metadata.
    chunks = collections.Counter(name for name, _, part in parts if not part.startswith("."))
    errors = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    errors += [f"{name} is unexpected" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        leaf, (shape, dtype) = stored[name], expected[name]
        if (tuple(leaf.shape), np.dtype(leaf.dtype)) != (shape, dtype):
            errors.append(f"{name} is {leaf.dtype} {tuple(leaf.shape)}, not {dtype} {shape}")
            continue
        sizes = leaf.storage.chunk_shape if leaf.storage else shape
        count = math.prod(math.ceil(n / size) for n, size in zip(shape, sizes, strict=True))
        if chunks[name] != count:
            errors.append(f"{name} has {chunks[name]} of its {count} chunks")
    if errors:
        more = f" and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise OSError(f"its item {folder.name!r} is damaged: {'; '.join(errors[:5])}{more}")


def _by_name(tree: Any) -> dict[str, Any]:
    """A tree's leaves by orbax's names for them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _kvstore(folder: epath.Path) -> dict[str, Any]:
    """Returns tensorstore's spec for an item's arrays, on disk or in a bucket."""
    path = str(folder)
    scheme, colon, rest = path.partition("://")
    if not colon:
        return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    bucket, _, inner = rest.partition("/")
    driver = {"gs": "gcs"}.get(scheme, scheme)
    return {"driver": "ocdbt", "base": {"driver": driver, "bucket": bucket, "path": f"{inner}/"}}
