"""Reads published weights into our parameters, and exports ours for other software.

Formats: Hugging Face folders, files of OpenAI and OpenCLIP, and CLIPTrans' checkpoints; see
`tensors.kinds.KINDS`.
"""

import dataclasses
import json
import logging
import operator
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

from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.tensors import kinds
from cliptrans_jax.tensors.beside import Beside, read_beside
from cliptrans_jax.tensors.config_json import CONFIG, section_key
from cliptrans_jax.tensors.kinds import KINDS, Layout
from cliptrans_jax.tensors.pictures import require_pictures
from cliptrans_jax.translators.transformer import TransformerConfig
from common_jax.config import did_you_mean
from common_jax.untrusted import brief
from common_jax.weights import (
    Account,
    format_assumed,
    list_problems,
    module_classes,
    read_weights,
    write_tensors,
)
from common_jax.weights import format_account as format_account
from common_jax.weights.beside import PROCESSORS
from common_jax.weights.files import SUFFIXES, require_local, same_content
from common_jax.weights.table import (
    Pretrained,
    as_float32,
    expected_tensors,
    list_differences,
    read,
    take_prefix,
    write,
)

# Files to download: configs, tokenizer, and the weights in one of two formats.
ABOUT = (
    *("config.json", *PROCESSORS, "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "sentencepiece.bpe.model"),
    *("vocab.json", "merges.txt", "vocab.txt"),
)
ADVICE = "check that the model's config (sizes, mapping network, prefix length) matches the file"
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")


def load(
    source: str | os.PathLike,
    *,
    kind: str | tuple[str, ...] | None = None,
    config: Any = None,
    fetch: bool = False,
    weights: str = "",
    activation: str = "",
    base: str = "",
    given: Mapping[str, Any] | None = None,
) -> Pretrained:
    """Reads published weights.

    Args:
      source: a Hugging Face folder (config.json and weights), a file or shards that
        `common_jax.weights` reads, or with `fetch` a model id on the Hugging Face hub.
      kind: a key of `tensors.kinds.KINDS`, or several, of which the first one in the file is read;
        None to infer it from config.json or the tensors' names, in which case a whole CLIP is read
        as its image tower. A CLIPTrans checkpoint that trained towers has them below "clip.".
      config: sizes to use instead of those in the JSON files beside the weights or, without such
        files, in the tensors' shapes. Shapes do not show heads, ids and epsilons: those of the
        published models are then assumed, and listed under "assumed" in the account.
      fetch: whether `source` may be downloaded.
      weights: which weights to read from a file with several: a key of a training checkpoint, such
        as "model_ema", or a prefix of the names with its dot, such as "teacher.".
      activation: activation of a CLIP tower's MLPs, "quick_gelu" or "gelu", if no file says:
        tensors of OpenAI and OpenCLIP have the same names.
      base: base model of an M-CLIP, overrides `modelBase` in its config.json.
      given: without JSON files beside the weights: values of config fields by path, such as
        "mbart.encoder_heads", which override those from the tensors' shapes.

    Raises:
      FileNotFoundError: if the source does not exist or cannot be downloaded.
      ValueError: for a file that cannot be read, is of no known kind, or does not fit the config;
        an unsupported setting in a JSON file; an unknown or contradictory activation; non-finite
        numbers.
    """
    allowed = (kind,) if isinstance(kind, str) else kind or ()
    if unknown := [name for name in allowed if name not in KINDS]:
        hint = did_you_mean(unknown[0], KINDS)
        raise ValueError(f"kind={unknown[0]!r} is none of {sorted(KINDS)}{hint}")
    path = find(source, fetch=fetch)
    file, about = str(path), read_beside(path)
    kinds.require_supported_type(about.get(CONFIG), file)
    kind = kinds.kind_of_config(about.get(CONFIG), file) if len(allowed) != 1 else None
    prefix = weights if weights.endswith(".") else ""
    stored = read_weights(path, weights="" if prefix else weights)
    tensors = stored.tensors
    kind = kinds.choose_kind(allowed, kind, tensors, file)
    layout, prefix = kinds.find_layout(kind, tensors, file, prefix)
    tensors, others = take_prefix(tensors, prefix)
    notes, assumed = (*stored.notes, *others.notes), ()
    if config is None:
        config, assumed, more = _config(layout, tensors, about, path, activation, base, given or {})
        notes += more
    elif not isinstance(config, layout.config_type):
        raise ValueError(
            f"config is a {type(config).__name__}, but kind={kind!r} takes a "
            f"{layout.config_type.__name__}"
        )
    if layout.pictures:
        require_pictures(about, layout.pictures, config.image, file)
    params, account = read(
        layout.table(config),
        tensors,
        shapes=layout.shapes(config),
        file=f"{file}, below {prefix!r}," if prefix else file,
        advice=lambda _: ADVICE,
    )
    params = as_float32(params, file)
    account = dataclasses.replace(
        account,
        dropped=(*others.dropped, *account.dropped),
        notes=(*notes, *account.notes),
        assumed=assumed,
    )
    for note in account.notes:
        logging.info("%s: %s", source, note)
    if assumed:
        logging.warning("%s does not say, so assumed: %s", source, format_assumed(account))
    return Pretrained(kind, config, params, account, str(source))


def _config(
    layout: Layout,
    tensors: Mapping[str, np.ndarray],
    about: Beside,
    path: Path,
    activation: str,
    base: str,
    given: Mapping[str, Any],
) -> tuple[Any, tuple[tuple[str, str], ...], tuple[str, ...]]:
    """The config of a layout's tensors, its assumed fields, and notes on where other fields are
    from."""
    content, file = about.get(layout.about), str(path)
    if base and not (content is not None and "modelBase" in content):
        raise ValueError(
            f"config.sources.clip_text_base={base!r} is for an M-CLIP with a config.json, and "
            f"{file} has none with a modelBase; leave it out"
        )
    if base:
        content = content | {
            "modelBase": str(Path(base).absolute()) if Path(base).exists() else base
        }
    try:
        config = layout.config(tensors, content, file, given)
    except ValueError as error:
        raise ValueError(error if file in str(error) else f"{file}: {error}") from None
    assumed, notes = list(layout.unstated) if content is None else [], _unused(layout, content)
    if layout.varied and content is None:
        value, notes = _activation(layout, path, activation)
        config = dataclasses.replace(config, activation=value)
        if activation or notes:
            assumed.remove("activation")
    elif layout.varied and activation not in ("", config.activation):
        raise ValueError(
            f"{file}: its {layout.about} says activation={config.activation!r}, but "
            f"config.sources.clip_activation={activation!r} is set; leave the latter out"
        )
    fields = {name: operator.attrgetter(name)(config) for name in assumed if name not in given}
    return config, tuple((name, repr(value)) for name, value in fields.items()), notes


def _unused(layout: Layout, content: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Notes on dropout rates in a JSON file that have no effect here."""
    content = content or {}
    section = content.get(section_key(content, layout.side))
    if isinstance(section, dict):
        content = content | section
    rates = {key: content.get(key) for key in layout.about_unused}
    other = f"; {layout.dropout} sets the dropout" if layout.dropout else ""
    return tuple(
        f"{key}={brief(rate)} in its {layout.about} has no effect here, not even in training{other}"
        for key, rate in rates.items()
        if rate
    )


def _activation(layout: Layout, path: Path, choice: str) -> tuple[str, tuple[str, ...]]:
    """The activation of a CLIP without a config file, and a note if the weights file reveals it."""
    if "QuickGELU" in module_classes(path):
        if choice not in ("", "quick_gelu"):
            raise ValueError(
                f"{path} has QuickGELU modules, but config.sources.clip_activation={choice!r} is "
                "set; leave the latter out"
            )
        return "quick_gelu", ("activation='quick_gelu', from its QuickGELU modules",)
    if choice or path.name in layout.quick:
        return choice or "quick_gelu", ()
    raise ValueError(
        f"{path} does not say which activation its towers were trained with, and models with the "
        "same tensors differ in it (OpenAI's use quick GELU, most of OpenCLIP's use GELU): put its "
        f"{layout.about} beside it, or set "
        "--config.sources.clip_activation=quick_gelu or gelu (`activation` of pretrained.load)"
    )


def save(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    config: TransformerConfig,
    *,
    tokenizer_files: Sequence[str | os.PathLike] = (),
) -> None:
    """Atomically writes a folder that `transformers` loads as the class named in its config.json.

    Args:
      folder: new, empty, or with exactly this content.
      params: parameters of a translator, below its subtree.
      config: its sizes.
      tokenizer_files: files to copy beside the weights.

    Raises:
      FileExistsError: if the folder has other content.
      FileNotFoundError: if a file of the tokenizer is missing.
      ValueError: if the parameters do not fit `config`.
    """
    folder, extra = Path(folder), {Path(file).name: Path(file) for file in tokenizer_files}
    if missing := [str(file) for file in extra.values() if not file.is_file()]:
        raise FileNotFoundError(f"tokenizer_files: there is no {', '.join(missing)}")
    names = {"config.json", "model.safetensors", *extra}
    if len(names) != 2 + len(tokenizer_files):
        raise ValueError(f"tokenizer_files={[*map(str, tokenizer_files)]} must differ in name")
    conflict = FileExistsError(f"{folder} exists and holds something else; give another folder")
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if (there and there != names) or (folder.exists() and not folder.is_dir()):
        raise conflict
    layout = kinds.written_layout(config)
    tensors = _tensors(layout, params, config)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(layout.to_about(config), indent=2) + "\n")
        write_tensors(part / "model.safetensors", tensors)
        for name, file in extra.items():
            shutil.copyfile(file, part / name)
        if not there:
            os.replace(part, folder)
        elif not all(same_content(part / name, folder / name) for name in names):
            raise conflict
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_cliptrans(path: str | os.PathLike, params: Mapping[str, Any], config: ModelConfig) -> None:
    """Writes {"mbart": ..., "mapper": ...} as one `.safetensors` file with the names of CLIPTrans'
    checkpoints; the shared embedding is stored once.

    Raises:
      FileExistsError: if the file exists with other content.
      FileNotFoundError: if its folder is missing.
      ValueError: if the parameters do not fit `config`, or the suffix is another.
    """
    write_tensors(path, _tensors(kinds.CLIPTRANS, params, config))


def cliptrans_tensors(
    params: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, np.ndarray], Account]:
    """{"mbart": ..., "mapper": ...} with the names of CLIPTrans' checkpoints, where the shared
    embedding has several, and the account of the names.

    Raises:
      ValueError: if the parameters do not fit `config`.
    """
    tensors, table = _tensors(kinds.CLIPTRANS, params, config), kinds.CLIPTRANS.table(config)
    expected = expected_tensors(table, params)
    rows = tuple((name, path, shape) for name, (path, shape) in expected.items())
    named = tensors | {alias: tensors[name] for alias, name in table.aliases.items()}
    return named, Account(rows, tuple(table.aliases.items()))


def place(params: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Puts numpy parameters on devices; each device gets only its own shard.

    Args:
      params: nested dict of numpy arrays.
      shapes: nested dict of ShapeDtypeStructs with shardings.

    Raises:
      ValueError: naming all parameters that are missing, unknown or of another shape.
    """
    _require(params, shapes)

    def put(x: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(
            target.shape, target.sharding, lambda index: np.array(x[index], target.dtype, order="C")
        )

    return jax.tree.map(put, dict(params), dict(shapes))


def find(source: str | os.PathLike, *, fetch: bool) -> Path:
    """The local path of `load`'s source; raises as `load` does."""
    path, name = Path(source).expanduser(), str(source)
    require_local(name)
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
    except Exception as error:  # errors of the hub and of its HTTP library
        raise FileNotFoundError(
            f"{name} cannot be fetched from Hugging Face's hub ({type(error).__name__}: {error}); "
            "without network access, fetch it elsewhere (`hf download`), copy the folder here and "
            "give its path"
        ) from error
    return Path(folder)


def _tensors(layout: Layout, params: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
    """Our parameters as float32 tensors under a layout's names."""
    _require(params, layout.shapes(config))
    tensors = write(layout.table(config), params)
    return {name: np.asarray(x, np.float32) for name, x in tensors.items()}


def _require(params: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Raises ValueError if parameters do not have the expected shapes."""
    if problems := list_differences(params, shapes):
        raise ValueError(
            f"the parameters do not belong to this model ({len(problems)} differ):"
            f"{list_problems(problems)}\ngive the config that they were trained with"
        )
