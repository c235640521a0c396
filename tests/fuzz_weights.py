"""Safetensors and shard indices: samples, our reading, and that of the safetensors library."""

import json
import random
from pathlib import Path

import mutations
import numpy as np
import safetensors
import safetensors.numpy
from fuzz_format import Format
from fuzz_torch import TENSORS, Tensors

from common_jax.weights import read_tensors
from common_jax.weights.safetensors_file import DTYPES

# ----- safetensors -----


def _safetensors_samples() -> tuple[bytes, ...]:
    arrays = {name: np.ascontiguousarray(x) for name, x in TENSORS.items()}
    eight = np.arange(6, dtype=np.uint8).tobytes()
    header = {"a": {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [0, 6]}}
    header["b"] = {"dtype": "F8_E5M2", "shape": [6], "data_offsets": [6, 12]}
    return (
        safetensors.numpy.save(arrays, metadata={"format": "pt"}),
        safetensors.numpy.save({"a": arrays["weight"]}),
        _with_header(json.dumps(header).encode(), eight + eight),
    )


def _with_header(header: bytes, numbers: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + numbers


def _header(rng: random.Random, data: bytes) -> bytes:
    """The header changed, with a matching length."""
    size = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + size], data[8 + size :]
    change = rng.choice((mutations.json_text, mutations.json_text, mutations.digits))
    return _with_header(change(rng, header), rng.choice((numbers, numbers, numbers + bytes(4))))


def _plain_safetensors(path: Path, content: bytes) -> Tensors:
    return {
        name.removeprefix("module."): np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(
            x["shape"]
        )
        for name, x in safetensors.deserialize(content)
    }


# ----- an index of shards -----

SHARDS = {"one.safetensors": ("weight", "half"), "two.safetensors": ("brain", "count")}
INDEX = "model.safetensors.index.json"


def _write_shards(folder: Path) -> None:
    for file, names in SHARDS.items():
        safetensors.numpy.save_file({name: TENSORS[name] for name in names}, folder / file)
    (folder / "loop.safetensors").unlink(missing_ok=True)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder.safetensors").mkdir(exist_ok=True)


def _names(rng: random.Random, data: bytes) -> bytes:
    """An index that names other files."""
    try:
        index = json.loads(data)
        tensors = [*index["weight_map"].keys()]
    except (AttributeError, ValueError, TypeError, KeyError, RecursionError):
        return mutations.flip(rng, data)
    files = [INDEX, "loop.safetensors", "folder.safetensors", "three.safetensors", *SHARDS]
    files += ["../one.safetensors", "/etc/passwd", "", ".", "a\x00", "a\n", "\ud800", "x" * 300]
    index["weight_map"] = {name: rng.choice(tuple(SHARDS)) for name in tensors}
    for name in tensors[: rng.randrange(4)]:
        index["weight_map"][name] = rng.choice(files)
    return json.dumps(index).encode()


def _plain_index(path: Path, content: bytes) -> Tensors:
    where = json.loads(content.decode("utf-8-sig"))["weight_map"]
    found: Tensors = {}
    for file in set(where.values()):
        found |= safetensors.numpy.load_file(path.parent / file)
    assert set(where) <= set(found)
    return found


def safetensors_files() -> Format:
    """Files with one tensor and with many, also of narrow types."""
    return Format(
        "safetensors",
        "model.safetensors",
        _safetensors_samples(),
        (_header,),
        read_tensors,
        _plain_safetensors,
        checked=False,
    )


def shard_indices() -> Format:
    """An index of two files."""
    return Format(
        "shard index",
        INDEX,
        (
            json.dumps(
                {"metadata": {}, "weight_map": {n: f for f, names in SHARDS.items() for n in names}}
            ).encode(),
        ),
        (mutations.json_text, _names),
        read_tensors,
        _plain_index,
        checked=False,
        prepare=_write_shards,
    )
