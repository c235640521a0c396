"""The content of a checkpoint's folder, checked without reading its parameters."""

import asyncio
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

# The item that names the run of a checkpoint, {"id": of run.json, "step": its own number}.
MARK = "run"
JSON = "metadata"  # orbax's name for the file of a JSON item
# Anything that orbax, tensorstore or the system raises, in this thread or another.
FAILURES = (Exception, asyncio.CancelledError)

Outline = dict[str, tuple[tuple[int, ...], np.dtype]]  # shape and type by orbax's name of an array


@dataclasses.dataclass(frozen=True)
class Mark:
    """The run that a checkpoint belongs to.

    Attributes:
      id: of its run.
      step: its own number, even if its folder is renamed.
    """

    id: str
    step: int


def read_mark(step: epath.Path) -> Mark | None:
    """The mark of a step's folder; None where an earlier version wrote it, without one.

    Raises:
      ValueError, OSError: when there is one that cannot be read.
    """
    if not (step / MARK).exists():
        return None
    path = step / MARK / JSON
    content = read_json(path)
    found, number = content.get("id"), content.get("step")
    if not isinstance(found, str) or type(number) is not int:
        raise ValueError(f"{path} holds {str(content)[:200]}, where a run's id and step belong")
    return Mark(found, number)


def read_stored_step(step: epath.Path) -> int:
    """The number of updates in a step's state.

    Raises:
      FAILURES: of tensorstore, when it cannot be read.
    """
    spec = {"driver": "zarr", "kvstore": {**_kvstore(step / "trainer"), "path": "step/"}}
    return int(ts.open(spec, open=True, read=True).result().read().result())


def outline(tree: Any) -> Outline:
    """Shapes and types of a tree's arrays, by orbax's names of them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            tuple(leaf.shape),
            np.dtype(leaf.dtype),
        )
        for path, leaf in leaves
    }


def check_written(
    folder: epath.Path, arrays: Mapping[str, Outline], texts: Mapping[str, Any]
) -> None:
    """Checks a written checkpoint: every item, the shape, type and chunks of every array, and every
    JSON. No array is read.

    Args:
      folder: of a step.
      arrays: the expected arrays of each item.
      texts: the expected value of each JSON item.

    Raises:
      OSError: when anything is missing or differs, with its name.
    """
    for item, value in texts.items():
        # As text, in which NaN equals itself.
        if json.dumps(read_json(folder / item / JSON)) != json.dumps(value):
            raise OSError(f"its item {item!r} reads back as something else")
    for item, wanted in arrays.items():
        _check_item(folder / item, wanted)


def _check_item(folder: epath.Path, wanted: Outline) -> None:
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        keys = ts.KvStore.open(_kvstore(folder)).result().list().result()
    except FAILURES as error:
        raise OSError(f"its item {folder.name!r} does not read back: {str(error)[:300]}") from error
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if hasattr(leaf, "shape")  # which orbax's placeholder of an empty node lacks
    }
    chunks: dict[str, int] = {}
    for key in keys:
        name, _, part = key.decode().rpartition("/")
        if not part.startswith("."):  # .zarray describes an array
            chunks[name] = chunks.get(name, 0) + 1
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"{name} is unexpected" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        leaf, (shape, dtype) = found[name], wanted[name]
        if (tuple(leaf.shape), np.dtype(leaf.dtype)) != (shape, dtype):
            wrong.append(f"{name} is {leaf.dtype} {tuple(leaf.shape)}, and was {dtype} {shape}")
            continue
        sizes = leaf.storage.chunk_shape if leaf.storage else shape
        count = math.prod(math.ceil(n / size) for n, size in zip(shape, sizes, strict=True))
        if chunks.get(name, 0) != count:
            wrong.append(f"{name} has {chunks.get(name, 0)} of its {count} chunks")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise OSError(f"its item {folder.name!r} reads back wrong: {'; '.join(wrong[:5])}{more}")


def _kvstore(folder: epath.Path) -> dict[str, Any]:
    """tensorstore's description of an item's arrays, on a disk or in a bucket."""
    path = str(folder)
    scheme, colon, rest = path.partition("://")
    if not colon:
        return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    bucket, _, inner = rest.partition("/")
    driver = {"gs": "gcs"}.get(scheme, scheme)
    return {"driver": "ocdbt", "base": {"driver": driver, "bucket": bucket, "path": f"{inner}/"}}
