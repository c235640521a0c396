"""Published weights as our parameters, and ours as files that others read.

Folders of Hugging Face, OpenAI's RN50x64 and CLIPTrans' own checkpoints; see `tensors.kinds.KINDS`.
"""

import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
from flax import traverse_util

from cliptrans_jax import names
from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.models.mbart import MBartConfig
from cliptrans_jax.tensors import kinds
from cliptrans_jax.tensors.kinds import KINDS, Layout
from common_jax.config import did_you_mean
from common_jax.tensors import Account, format_account, read_tensors, write_tensors
from common_jax.tensors.files import NARROW, SUFFIXES, same_content

__all__ = [
    "Pretrained",
    "cliptrans_tensors",
    "format_account",
    "load",
    "place",
    "save",
    "save_cliptrans",
]

FLOATS = ("float32", "float64", *NARROW)
# What is fetched: what a model is and its tokenizer, and its weights in one of two formats.
ABOUT = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
)
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Published weights as ours.

    Attributes:
      kind: a key of `tensors.kinds.KINDS`.
      config: the network's sizes.
      params: numpy arrays of float32 in our tree; of "cliptrans" {"mbart": ..., "mapper": ...}.
      account: what became of every tensor.
      source: where they come from, as it was given.
    """

    kind: str
    config: Any
    params: Mapping[str, Any]
    account: Account
    source: str


def load(
    source: str | os.PathLike,
    *,
    kind: str | None = None,
    config: Any = None,
    fetch: bool = False,
) -> Pretrained:
    """Reads published weights.

    Args:
      source: a folder of Hugging Face (config.json and weights), a file or shards of weights as
        `common_jax.tensors` reads them, or with `fetch` a model's id on Hugging Face's hub.
      kind: a key of `tensors.kinds.KINDS`; None to be told by config.json or by the tensors'
        names, where a CLIP of two towers is its image tower. The towers are also found below
        "clip." in a CLIPTrans checkpoint that trained them.
      config: sizes, in place of those of config.json or, without one, of the tensors' shapes, which
        do not tell heads, ids and epsilons: these are then the published models'.
      fetch: whether `source` may be downloaded.

    Raises:
      FileNotFoundError: for no such source, or one that cannot be fetched.
      ValueError: for a file that cannot be read, is of no known kind, or does not fit the config; a
        setting of config.json that is not supported; numbers that are not finite.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {sorted(KINDS)}{did_you_mean(kind, KINDS)}")
    path = _find(source, fetch)
    file = str(path)
    hf = _read_json(path / "config.json") if (path / "config.json").is_file() else None
    kind = kind or kinds.kind_of_config(hf, file)
    tensors = read_tensors(path)
    kind = kind or kinds.kind_of_tensors(tensors)
    if kind is None:
        raise ValueError(
            f"{file} is of no known kind: {sorted(KINDS)}; its tensors are called "
            f"{sorted(tensors)[:4]}. Give the weights of one of these"
        )
    layout, prefix = kinds.find_layout(kind, tensors, file)
    if config is None:
        config = layout.config(tensors, hf, file)
    elif not isinstance(config, layout.config_type):
        raise ValueError(
            f"config is a {type(config).__name__}, and kind={kind!r} takes a "
            f"{layout.config_type.__name__}"
        )
    dropped = {re.escape(prefix) + regex: why for regex, why in layout.dropped.items()}
    if prefix:
        dropped |= {rf"(?!{re.escape(prefix)}).*": "of the rest of the model"}
    params, account = names.read(
        names.below(layout.table(config), source=prefix, target=""),
        tensors,
        shapes=layout.shapes(config),
        file=file,
        aliases=layout.aliases,
        dropped=dropped,
    )
    flat = traverse_util.flatten_dict(params, sep="/")
    if odd := [f"{path} is {x.dtype}" for path, x in flat.items() if x.dtype.name not in FLOATS]:
        raise ValueError(f"{file} is not of plain numbers: {'; '.join(odd[:5])}; take another file")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    flat = traverse_util.flatten_dict(params, sep="/")
    if odd := [path for path, x in flat.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{file} holds numbers that are not finite, in {', '.join(odd[:5])}")
    return Pretrained(kind, config, params, account, str(source))


def save(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    config: MBartConfig,
    *,
    tokenizer_files: Sequence[str | os.PathLike] = (),
) -> None:
    """Writes a folder for `transformers.MBartForConditionalGeneration.from_pretrained`, the whole
    of it or nothing.

    Args:
      folder: new, empty, or already holding just this.
      params: of "mbart".
      tokenizer_files: copied beside the weights.

    Raises:
      FileExistsError: when the folder holds something else.
      FileNotFoundError: when a tokenizer's file is missing.
      ValueError: when the parameters are not of `config`.
    """
    folder, extra = Path(folder), {Path(file).name: Path(file) for file in tokenizer_files}
    if missing := [str(file) for file in extra.values() if not file.is_file()]:
        raise FileNotFoundError(f"tokenizer_files: there is no {', '.join(missing)}")
    wanted = {"config.json", "model.safetensors", *extra}
    if len(wanted) != 2 + len(tokenizer_files):
        raise ValueError(f"tokenizer_files={[*map(str, tokenizer_files)]} must differ in name")
    refused = FileExistsError(f"{folder} exists and holds something else; give another folder")
    held = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if (held and held != wanted) or (folder.exists() and not folder.is_dir()):
        raise refused
    tensors = _tensors(kinds.MBART, params, config)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        part.mkdir(parents=True)
        (part / "config.json").write_text(
            json.dumps(kinds.mbart_hf_config(config), indent=2) + "\n"
        )
        write_tensors(part / "model.safetensors", tensors)
        for name, file in extra.items():
            shutil.copyfile(file, part / name)
        if not held:
            os.replace(part, folder)
        elif not all(same_content(part / name, folder / name) for name in wanted):
            raise refused
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_cliptrans(path: str | os.PathLike, params: Mapping[str, Any], config: ModelConfig) -> None:
    """Writes {"mbart": ..., "mapper": ...} as one `.safetensors` file under the names of CLIPTrans'
    checkpoints, the shared embedding once.

    Raises:
      FileExistsError: when the file is there and holds something else.
      FileNotFoundError: when its folder is missing.
      ValueError: when the parameters are not of `config`, or for another suffix.
    """
    write_tensors(path, _tensors(kinds.CLIPTRANS, params, config))


def cliptrans_tensors(
    params: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, np.ndarray], Account]:
    """{"mbart": ..., "mapper": ...} under the names of CLIPTrans' checkpoints, the shared embedding
    under all of its own, and which tensor is which parameter.

    Raises:
      ValueError: when the parameters are not of `config`.
    """
    tensors, table = _tensors(kinds.CLIPTRANS, params, config), kinds.CLIPTRANS.table(config)
    taken = [(name, path, tensors[name].shape) for path, e in table.items() for name in e.names]
    aliases = kinds.CLIPTRANS.aliases
    named = tensors | {alias: tensors[name] for alias, name in aliases.items()}
    return named, Account(tuple(taken), tuple(aliases.items()))


def place(params: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Numpy parameters on devices, each device given only its own part.

    Args:
      params: nested dict of numpy arrays.
      shapes: the same of ShapeDtypeStructs with shardings.

    Raises:
      ValueError: naming every parameter that is missing, without a place or of another shape.
    """
    _require(params, shapes)

    def put(x: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(
            target.shape, target.sharding, lambda index: np.array(x[index], target.dtype, order="C")
        )

    return jax.tree.map(put, dict(params), dict(shapes))


def _find(source: str | os.PathLike, fetch: bool) -> Path:
    """Where the source lies on this machine."""
    path, name = Path(source), str(source)
    if "://" in name:
        raise ValueError(f"{name} must be on a disk of this machine; copy it to one first")
    if path.exists() or path.name.endswith(SUFFIXES):
        return path
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise FileNotFoundError(f"there is no {name}; give a folder or a file of weights")
    if not fetch:
        raise FileNotFoundError(
            f"there is no {name}; give a folder or a file of weights, or fetch=True to download "
            "the model of that name from Hugging Face's hub"
        )
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=[*ABOUT, *SAFETENSORS])
        if not any(Path(folder).glob("*.safetensors")):
            folder = huggingface_hub.snapshot_download(name, allow_patterns=[*ABOUT, *TORCH])
    except Exception as error:  # the hub's own, and those of the library that it speaks HTTP with
        raise FileNotFoundError(
            f"{name} cannot be fetched from Hugging Face's hub ({type(error).__name__}: {error}); "
            "without network, fetch it elsewhere (`hf download`), copy the folder here and give "
            "its path"
        ) from error
    return Path(folder)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary, as Hugging Face writes it")
    return content


def _tensors(layout: Layout, params: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
    """Our parameters as tensors of float32 under a layout's names."""
    _require(params, layout.shapes(config))
    tensors = names.write(layout.table(config), params)
    return {name: np.asarray(x, np.float32) for name, x in tensors.items()}


def _require(params: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Holds parameters against the shapes that they should have."""
    flat, wanted = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, shapes))
    problems = [
        f"{path} {wanted[path].shape} is missing" for path in sorted(set(wanted) - set(flat))
    ]
    problems += [
        f"{path} {np.shape(flat[path])} has no place" for path in sorted(set(flat) - set(wanted))
    ]
    problems += [
        f"{path} is {np.shape(x)} and should be {wanted[path].shape}"
        for path, x in flat.items()
        if path in wanted and np.shape(x) != wanted[path].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(
            f"the parameters are not of this model ({len(problems)} differ):\n  {shown}\ngive the "
            "config that they were made with"
        )
