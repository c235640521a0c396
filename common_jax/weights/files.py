"""Reads and writes weights as numpy arrays by name: safetensors and PyTorch's zip archives, in one
file or in shards, without PyTorch."""

import dataclasses
import filecmp
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common_jax.untrusted import RefusedError, brief, parse_json, plain, refuse_pointer
from common_jax.weights import safetensors_file, torch_archive, torch_writer
from common_jax.weights.naming import plain_names
from common_jax.weights.torch_pickle import EXPORT
from common_jax.workdir import in_bucket, replacing

# File names of the weights in a folder; the first one that exists is read.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# Suffixes of PyTorch's files. A file's content decides its format; these are mainly for messages.
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".pth.tar", ".ckpt")
SUFFIXES = (".safetensors", ".index.json", *TORCH_SUFFIXES)
# Floating-point types with fewer than 32 bits.
NARROW = (
    *("bfloat16", "float16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
)
ZIP = b"PK\x03\x04"
LONGEST_FILE_NAME = 255  # bytes, as in most file systems
Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a file or folder by name, with their stored dtypes, and notes on how they were
    read: the chosen state dict, removed prefixes."""

    tensors: Tensors
    notes: tuple[str, ...] = ()


def read_tensors(path: str | os.PathLike) -> Tensors:
    """The tensors of `read_weights`."""
    return read_weights(path).tensors


def read_weights(path: str | os.PathLike, *, weights: str = "") -> Weights:
    """All tensors of a file or folder by name, with their stored dtypes. Runs no code in a file.

    Args:
      path: a file in safetensors or PyTorch's zip format (a state dict, a checkpoint with one under
        "model" or "state_dict", a TorchScript archive), an `.index.json` of shards, or a folder
        with one of `FOLDER_FILES`. If `NAME.pth` is missing, `NAME_1.pth`, `NAME_2.pth`, ... are
        read, the form in which CLIPTrans is released. Prefixes that frameworks add to names
        ("module.", "_orig_mod.") are removed.
      weights: key of the state dict to read, such as "model_ema", from a PyTorch file with several.

    Raises:
      FileNotFoundError: if there is no such file, or shards are missing.
      ValueError: for a URL; for a file that is truncated, damaged or in another format, that has no
        dictionary of only tensors, or that has several and `weights` chooses none.
    """
    require_local(path)
    path = Path(path)
    if path.is_dir():
        file = weights_file(path)
        if file is None:
            there = ", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing"
            raise FileNotFoundError(
                f"{path} holds none of {', '.join(FOLDER_FILES)}, but {there}; give the folder or "
                "the file with the weights"
            )
        path = file
    if path.is_file():
        read = _read_file(path, weights)
    else:
        read = _merge((shard, _read_file(shard, weights)) for shard in _numbered(path))
    try:
        tensors, notes = plain_names(read.tensors)
    except RefusedError as refused:
        raise ValueError(f"{path} {refused}") from None
    return Weights(tensors, (*read.notes, *notes))


def require_local(path: str | os.PathLike) -> None:
    """Raises ValueError for a URL."""
    if in_bucket(path):
        raise ValueError(f"{path} must be on a local disk; copy it to one first")


def weights_file(folder: Path) -> Path | None:
    """The file with a folder's weights, or None."""
    return next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)


def read_plain(path: str | os.PathLike) -> dict[str, Any]:
    """The numbers, strings and lists of these that a PyTorch checkpoint has beside its tensors, by
    key; {} for other files and for folders. Raises ValueError as `read_tensors`."""
    path = Path(path)
    return torch_archive.read_plain(path) if path.is_file() and _is_torch(path) else {}


def module_classes(path: str | os.PathLike) -> frozenset[str]:
    """Class names of the modules in a TorchScript archive; empty for other files and for folders.
    Raises ValueError as `read_tensors`."""
    path = Path(path)
    is_torch = path.is_file() and _is_torch(path)
    return torch_archive.module_classes(path) if is_torch else frozenset()


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], *, replace: bool = False
) -> None:
    """Writes one safetensors file atomically; overwrites different content only if `replace`.

    Raises:
      FileExistsError: if the file exists with other content.
      FileNotFoundError: if its folder is missing.
      ValueError: if its name does not end in `.safetensors`.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors, the format that it is written in")
    arrays = {name: np.asarray(x) for name, x in tensors.items()}
    _write(Path(path), lambda part: safetensors_file.write(part, arrays), replace)


def write_torch(path: str | os.PathLike, value: Any, *, replace: bool = False) -> None:
    """Writes one file in PyTorch's zip format atomically.

    Args:
      path, replace: as for `write_tensors`.
      value: see `torch_writer.write`; a training checkpoint is `{"model": tensors}`.

    Raises as `write_tensors`, and TypeError for a value that is neither an array nor plain.
    """
    if not Path(path).name.endswith(TORCH_SUFFIXES):
        raise ValueError(f"{path} must end in one of {', '.join(TORCH_SUFFIXES)}")
    _write(Path(path), lambda part: torch_writer.write(part, value), replace)


def _write(path: Path, write: Callable[[Path], None], replace: bool) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder; create it first")
    with replacing(path) as part:
        write(Path(part))
        if path.exists() and not (replace or same_content(path, Path(part))):
            raise FileExistsError(f"{path} exists and holds something else; give another name")


def same_content(a: Path, b: Path) -> bool:
    """True if two files have the same bytes."""
    return filecmp.cmp(a, b, shallow=False)


def _read_file(path: Path, weights: str) -> Weights:
    if path.name.endswith(SUFFIXES):
        _refuse_pointer(path)
    if path.name.endswith(".index.json"):
        return _read_indexed(path, weights)
    if _is_torch(path):
        chosen = torch_archive.read(path, weights)
        return Weights(dict(chosen.tensors), chosen.notes)
    if path.suffix == ".safetensors" or _start(path)[8:9] == b"{":
        if weights:
            raise ValueError(f"{path} holds bare tensors, none under weights={brief(weights)}")
        return Weights(safetensors_file.read(path))
    raise ValueError(
        f"{path} must end in one of {', '.join(SUFFIXES)}, the formats that can be read; convert "
        f"weights in another format, with PyTorch by {EXPORT}"
    )


def _is_torch(path: Path) -> bool:
    """True if a file is PyTorch's, by its content or, if that is not recognised, by its name."""
    start = _start(path)
    if start.startswith((ZIP, torch_archive.LEGACY)):
        return True
    # A safetensors file begins with the length of its header (8 bytes), which is a JSON object.
    return path.name.endswith(TORCH_SUFFIXES) and start[8:9] != b"{"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _numbered(path: Path) -> list[Path]:
    """The shards NAME_1.pth, NAME_2.pth, ... of a missing NAME.pth."""
    shape = re.compile(re.escape(path.stem) + r"_([1-9]\d*)" + re.escape(path.suffix))
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    shards = {int(m[1]): p for p in siblings if (m := shape.fullmatch(p.name))}
    if not path.suffix or not shards:
        raise FileNotFoundError(
            f"there is no {path}, and it has no shards {path.stem}_1{path.suffix or '.pth'}, ..."
        )
    if max(shards) != len(shards):
        gaps = (i for i in range(1, max(shards)) if i not in shards)
        names = ", ".join(f"{path.stem}_{i}{path.suffix}" for i in itertools.islice(gaps, 5))
        more = ", ..." if max(shards) - len(shards) > 5 else ""
        raise FileNotFoundError(f"shards of {path} are missing: {names}{more}; fetch them too")
    return [shards[i] for i in sorted(shards)]


def _merge(parts: Iterable[tuple[Path, Weights]]) -> Weights:
    merged, notes = {}, {}
    for path, part in parts:
        for name in set(merged) & set(part.tensors):
            if not _same(merged[name], part.tensors[name]):
                raise ValueError(
                    f"{path} holds {name} with other values than an earlier shard; the shards "
                    "do not belong to one model"
                )
        merged |= part.tensors
        notes |= dict.fromkeys(part.notes)
    return Weights(merged, tuple(notes))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """True for equal arrays, also if they have NaN, which is refused elsewhere."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return np.array_equal(a, b) or (alike and a.tobytes() == b.tobytes())


def _read_indexed(path: Path, weights: str) -> Weights:
    try:
        where = _weight_map(parse_json(path.read_bytes()))
    except RefusedError as refused:
        raise ValueError(
            f'{path} is not an index of shards: it must be JSON with a "weight_map" from tensors '
            f"to files ({refused})"
        ) from None
    files = sorted(set(where.values()))
    if outside := [file for file in files if not _is_plain_name(file)]:
        raise ValueError(f"{path} names {brief(outside[0])}, which is not in its own folder")
    if indices := [file for file in files if file.endswith(".json")]:
        raise ValueError(f"{path} names {brief(indices[0])}, which holds no tensors")
    if missing := [file for file in files if not (path.parent / file).is_file()]:
        names = ", ".join(map(plain, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(f"{path} names {names}, missing; fetch them too")
    read = _merge((path.parent / file, _read_file(path.parent / file, weights)) for file in files)
    if missing := sorted(set(where) - set(read.tensors)):
        raise ValueError(f"{path} names tensors that its files do not hold: {brief(missing)}")
    return read


def _weight_map(index: Any) -> dict[str, str]:
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict):
        raise RefusedError(f"it holds {brief(index)}")
    if odd := [name for name, file in where.items() if not isinstance(file, str)]:
        raise RefusedError(f"it maps {brief(odd[0])} to the file {brief(where[odd[0]])}")
    return where


def _is_plain_name(file: str) -> bool:
    """True if a name denotes a file in the same folder, on any system."""
    short = 0 < len(file.encode(errors="replace")) <= LONGEST_FILE_NAME
    return short and file.isprintable() and file not in (".", "..") and not set(file) & set("/\\:")


def _refuse_pointer(path: Path) -> None:
    """Raises ValueError if the file is empty or a git-lfs pointer."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path} is empty; copy or download it again")
    refuse_pointer(path, start)
