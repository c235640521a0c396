"""Files as parameters: strict about every name and shape, and never run."""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from common_jax.config import did_you_mean
from common_jax.weights import Account, read_plain, read_weights, weights_file
from common_jax.weights.files import TORCH_SUFFIXES
from common_jax.weights.table import (
    Pretrained,
    Table,
    as_float32,
    choose_prefix,
    read,
    take_prefix,
)
from m2mkd_jax.config import Config, InitConfig, SourcesConfig
from m2mkd_jax.pretrained.foreign import fields_of, foreign_parts, is_foreign, is_headless
from m2mkd_jax.pretrained.hub import Beside, read_beside, require_same
from m2mkd_jax.pretrained.kinds import KINDS, WHOLE, Kind, Tensors, guess

# Of one stage, what only the first or the last has.
FIRST = ("patch_embed.proj.weight", "cls_token", "tokenizer.positional_grid.grid")
LAST = ("head.weight", "tokenizer.to_logits.weight")


@dataclasses.dataclass(frozen=True)
class File:
    """One file.

    Attributes:
      path: of the file, or of its folder.
      tensors: by their names.
      plain: the numbers and texts beside them.
      beside: facts that the folder states.
      others: account of how the file was read, and of its other tensors.
    """

    path: Path
    tensors: Tensors
    plain: Mapping[str, Any]
    beside: Beside = Beside()
    others: Account = Account(())


@dataclasses.dataclass(frozen=True)
class Source:
    """Files of one kind, a key of KINDS: several only where each holds a stage."""

    kind: str
    files: tuple[File, ...]
    guessed: bool


def read_files(path: str | os.PathLike, *, weights: str = "") -> tuple[File, ...]:
    """Reads a file, its shards, or all files of a folder with a module each.

    Args:
      path: what `common_jax.weights.read_weights` reads, or a folder of such files.
      weights: which weights are read of a file that holds several: a key of a training checkpoint,
        such as "model_ema", or what stands before a network's names, with its dot: "teacher.".

    Raises:
      FileNotFoundError: when nothing is there.
      ValueError: for files that cannot be read, or that hold several networks of which none is
        chosen.
    """
    return tuple(_read(one, weights) for one in _files(Path(path)))


def find_source(files: tuple[File, ...], kind: str | None = None) -> Source:
    """The files as of a kind, a key of KINDS; None to guess it from the names.

    Raises:
      ValueError: for no such kind, tensors of no kind, several files where one holds all, and a
        network that there is none of here.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {sorted(KINDS)}{did_you_mean(kind, KINDS)}")
    name = kind or guess(files[0].tensors, files[0].plain, str(files[0].path))
    if len(files) > 1 and not KINDS[name].single:
        raise ValueError(
            f"there are {len(files)} files, {', '.join(str(f.path) for f in files)}, and "
            f"kind={name!r} is in one: give that file"
        )
    return Source(name, files, guessed=kind is None)


def load(source: Source, config: Config, *, overridden: Collection[str] = ()) -> Pretrained:
    """The parameters that the files of a source hold.

    Args:
      source: see `find_source`.
      config: sizes; of a single module also config.module, where the file does not say which.
        Parameters that config.sources.fresh names are left out, and the file need not have them.
      overridden: fields such as "data.mean" that the user gave by name, and that count more than
        what a folder says.

    Raises:
      ValueError: naming every tensor that is missing, unknown or of another shape, numbers that are
        not finite, modules that are there twice, and a mean or std that is not the folder's.
    """
    kind, trees, accounts = KINDS[source.kind], {}, []
    several = len(source.files) > 1
    for file in source.files:
        require_same(file.beside, config, kind.section, overridden)
        stage = find_stage(file, kind, config, of_many=several) if kind.single else None
        params, account = _load_file(file, source.kind, config, stage)
        if twice := sorted(trees.keys() & params.keys()):
            raise ValueError(
                f"{file.path} holds {twice[0]}, and so does a file beside it; a folder must have "
                "each module once"
            )
        trees |= params
        accounts.append(account)
    account = Account(
        *(sum((getattr(a, f.name) for a in accounts), ()) for f in dataclasses.fields(Account))
    )
    made = run_config(config, kind, tuple(trees))
    origin = str(source.files[0].path.parent if several else source.files[0].path)
    return Pretrained(source.kind, made, {kind.role: trees}, account, origin)


def run_config(config: Config, kind: Kind, stages: tuple[str, ...]) -> Config:
    """The config of the run that could have made these stages' parameters."""
    module = "all"
    if kind.phase in ("train_module", "distill"):
        module = "+".join(sorted((name.removeprefix("stage_") for name in stages), key=int))
    return dataclasses.replace(
        config,
        phase=kind.phase,
        module=module,
        sources=SourcesConfig(fresh=config.sources.fresh),
        init=InitConfig(),
        recipes={},
    )


def find_stage(file: File, kind: Kind, config: Config, *, of_many: bool) -> int:
    """The stage that a file of a single module holds.

    The config's word (config.module) counts first, then the file's own, then what only the first
    and the last stage have; of files in one folder, last, the number at the end of the name.

    Raises:
      ValueError: where nothing says it, or two of these differ.
    """
    count = len(kind.depths(config))
    stated = {}
    if config.module != "all":
        if len(config.modules()) != 1 or of_many:
            raise ValueError(
                f"config.module={config.module!r} must be one number for one file of a module, and "
                "'all' for a folder of them"
            )
        stated["config.module"] = config.modules()[0]
    if isinstance(file.plain.get("block_index"), int):
        stated["its block_index"] = file.plain["block_index"]
    if match := re.fullmatch(r"(ReadIn|Mediator|ReadOut)Student(?:_(\d+))?", file.path.stem):
        place = {"ReadIn": 0, "ReadOut": count - 1}.get(match[1], int(match[2] or -1))
        stated["its name"] = place
    whole = any(re.match(r"stages\.[1-9]", name) for name in file.tensors)
    if not whole and any(name in file.tensors for name in FIRST):
        stated["its embedding"] = 0
    elif not whole and any(name in file.tensors for name in LAST):
        stated["its head"] = count - 1
    number = re.search(r"(\d+)$", file.path.stem)
    if of_many and number:
        stated["the number in its name"] = int(number[1])
    if not stated:
        raise ValueError(
            f"{file.path} does not say which of the {count} modules it holds: give "
            f"--config.module=K, from 0 to {count - 1}"
        )
    if len(set(stated.values())) > 1:
        raise ValueError(
            f"{file.path}: which module it holds is unclear, {stated}; modules count from 0"
        )
    stage = next(iter(stated.values()))
    if not 0 <= stage < count:
        raise ValueError(
            f"{file.path} holds module {stage}, and config.{kind.section} has {count}, counted "
            "from 0; give the config that it was made with"
        )
    return stage


def _files(path: Path) -> list[Path]:
    if not path.is_dir() or weights_file(path):
        return [path]
    suffixes = (".safetensors", *TORCH_SUFFIXES)
    found = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if not found:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing"
        raise FileNotFoundError(
            f"{path} holds no file that ends in one of {', '.join(suffixes)}, but {there}"
        )
    return found


def _read(path: Path, weights: str) -> File:
    prefix = weights if weights.endswith(".") else ""
    stored = read_weights(path, weights="" if prefix else weights)
    tensors, others = take_prefix(
        stored.tensors, choose_prefix(WHOLE, stored.tensors, prefix, str(path))
    )
    return File(
        path,
        tensors,
        read_plain(path) if path.is_file() else {},
        read_beside(path),
        dataclasses.replace(others, notes=(*stored.notes, *others.notes)),
    )


def _load_file(
    file: File, name: str, config: Config, stage: int | None
) -> tuple[dict[str, Any], Account]:
    kind = KINDS[name]
    own, others = _own(file.tensors, stage)
    table, shapes, notes = _leave_fresh(
        kind.table(config, stage), kind.shapes(config, stage), kind.role, config.sources.fresh
    )

    def advice(problems: list[str]) -> str:
        return _advice(problems, own, kind, stage) + _depth_hint(own, kind, config)

    params, account = read(
        table,
        own,
        shapes=shapes,
        file=str(file.path),
        what=f"kind={name!r}",
        advice=advice,
    )
    account = dataclasses.replace(
        account,
        taken=tuple((tensor, f"{kind.role}/{path}", s) for tensor, path, s in account.taken),
        dropped=(*file.others.dropped, *others, *account.dropped),
        notes=(*file.others.notes, *account.notes, *notes),
    )
    params = as_float32(params, str(file.path))
    return jax.tree.map(lambda x: np.asarray(x, order="C"), params), account


def _leave_fresh(
    table: Table, shapes: Mapping[str, Any], role: str, fresh: str
) -> tuple[Table, Mapping[str, Any], tuple[str, ...]]:
    """Table and shapes without the parameters that start from scratch, and a note of each.

    Raises:
      ValueError: where `fresh`, config.sources.fresh, names none.
    """
    if not fresh:
        return table, shapes, ()
    flat = traverse_util.flatten_dict(shapes, sep="/")
    out = [path for path in flat if re.fullmatch(fresh, f"{role}/{path}")]
    if not out:
        raise ValueError(
            f"config.sources.fresh={fresh!r} names none of the parameters, such as "
            f"{role}/{next(reversed(flat))}"
        )
    names = {name for path in out for name in table.entries[path].names}
    left = {re.escape(name): "config.sources.fresh" for name in sorted(names)}
    kept = {path: shape for path, shape in flat.items() if path not in out}
    notes = tuple(f"{role}/{path} is left out: config.sources.fresh" for path in out)
    return (
        dataclasses.replace(table, left_out={**table.left_out, **left}),
        traverse_util.unflatten_dict(kept, sep="/"),
        notes,
    )


def _advice(problems: list[str], state: Tensors, kind: Kind, stage: int | None) -> str:
    """The way out for a file that does not fit."""
    lines = []
    if not kind.is_nac and (parts := foreign_parts(state)):
        lines.append(
            f"the network in the file has {parts}, which no config of m2mKD's ViT has: take a "
            "model without"
        )
    if stage is None and not kind.is_nac and is_headless(state):
        lines.append(
            "the file has no classifier (head.weight), as timm leaves it with num_classes=0, and "
            "the logits of a teacher or meta model need its head: take the file with it, or add "
            "head.weight and head.bias of a classifier that was trained on this network. To "
            "convert it without, for what reads no head or trains one (modules but the last, "
            f"config.init.upcycle), give --config.sources.fresh='{kind.role}/stage_\\d+/head/.*'"
        )
    names = [problem.split()[0] for problem in problems]
    lacks_head = {name for name in names if name.startswith("head.") and name not in state}
    if not lines or not all(is_foreign(name) or name in lacks_head for name in names):
        fields = [] if kind.is_nac else fields_of(names)
        shown = ", ".join(f"config.{kind.section}.{field}" for field in fields)
        lines.append(
            f"give the config.{kind.section} and config.data of the network in the file (its "
            "position table is resized by the phase that takes it)"
            + (f", {shown} among them" if shown else "")
        )
    return "; ".join(lines)


def _own(tensors: Tensors, stage: int | None) -> tuple[Tensors, tuple[tuple[str, str], ...]]:
    """The tensors of a stage under its own names, where the file is of a network of several."""
    if stage is None or not any(re.match(r"stages\.[1-9]", name) for name in tensors):
        return tensors, ()
    prefix = f"stages.{stage}."
    own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    others = (n for n in tensors if not n.startswith(prefix))
    return own, tuple((name, "of other stages, or listed twice") for name in others)


def _depth_hint(state: Tensors, kind: Kind, config: Config) -> str:
    blocks = {m[1] for m in (re.match(r"blocks\.(\d+)\.", name) for name in state) if m}
    depths = kind.depths(config)
    if kind.single or not blocks or len(blocks) == sum(depths):
        return ""
    return (
        f"; the file has {len(blocks)} blocks, and config.{kind.section}.depths={depths} are "
        f"{sum(depths)}"
    )
