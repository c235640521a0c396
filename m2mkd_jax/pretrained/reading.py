"""Reading files as parameters: strict about every name and shape, and never running their code."""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util

from common_jax.config import did_you_mean
from common_jax.weights import Account, read_plain, read_weights, weights_file
from common_jax.weights.account import join
from common_jax.weights.files import TORCH_SUFFIXES, require_local
from common_jax.weights.table import Pretrained, as_float32, choose_prefix, read, take_prefix
from m2mkd_jax.config import Config, InitConfig, SourcesConfig
from m2mkd_jax.phases import PHASES
from m2mkd_jax.pretrained.hub import Beside, read_beside, require_same
from m2mkd_jax.pretrained.kinds import KINDS, Kind, count_blocks, guess
from m2mkd_jax.pretrained.parts import PARTS, Tensors, find, foreign_parts, is_headless
from m2mkd_jax.stages import stage_number


@dataclasses.dataclass(frozen=True)
class File:
    """One file.

    Attributes:
      path: path of the file, or of its folder.
      tensors: the tensors by name.
      plain: the numbers and strings stored beside them.
      beside: facts that the folder states.
      others: account of how the file was read, and of tensors that were not taken from it.
    """

    path: Path
    tensors: Tensors
    plain: Mapping[str, Any]
    beside: Beside = Beside()
    others: Account = Account(())


@dataclasses.dataclass(frozen=True)
class Source:
    """Files of one kind, a key of KINDS; there are several only if each holds a stage."""

    kind: str
    files: tuple[File, ...]
    guessed: bool


def read_files(path: str | os.PathLike, *, weights: str = "") -> tuple[File, ...]:
    """Reads a file, its shards, or all files of a folder with one module each.

    Args:
      path: what `common_jax.weights.read_weights` reads, or a folder of such files.
      weights: which weights to read from a file that holds several: a key of a training checkpoint,
        such as "model_ema", or the prefix of a network's names including the dot, such as
        "teacher.".

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      ValueError: for a URL, and files that cannot be read, or that hold several networks if
        `weights` does not choose one.
    """
    require_local(path)
    return tuple(_read(one, weights) for one in _files(Path(path)))


def find_source(files: tuple[File, ...], kind: str | None = None) -> Source:
    """The files as a source of a kind, a key of KINDS; None guesses it from the tensor names.

    Raises:
      ValueError: for an unknown kind, tensors of no kind, several files of a kind that takes one,
        and a network that this project does not have.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {sorted(KINDS)}{did_you_mean(kind, KINDS)}")
    # The files of a folder are all of one kind; `load` refuses any that does not fit it.
    name = kind or guess(files[0].tensors, files[0].plain, str(files[0].path))
    if len(files) > 1 and not KINDS[name].form.single:
        raise ValueError(
            f"there are {len(files)} files, {', '.join(str(f.path) for f in files)}, but "
            f"kind={name!r} is in a single file: give that file"
        )
    return Source(name, files, guessed=kind is None)


def load(source: Source, config: Config, *, overridden: Collection[str] = ()) -> Pretrained:
    """The parameters that the files of a source hold, and the config of a run that could have made
    them.

    Args:
      source: see `find_source`.
      config: the sizes; for a single module also config.module, if the file does not say which.
        Parameters that config.sources.fresh names are left out, and the file need not have them.
      overridden: fields such as "data.mean" that the user set explicitly, which override what the
        folder states.

    Raises:
      ValueError: for tensors that are missing, unknown or of another shape, all of which are named;
        for numbers that are not finite, modules that occur twice, and a mean or std that
        contradicts the folder.
    """
    kind, trees, accounts = KINDS[source.kind], {}, []
    several = len(source.files) > 1
    for file in source.files:
        require_same(file.beside, config, kind.section, overridden)
        stage = find_stage(file, kind, config, of_many=several) if kind.form.single else None
        params, own = _load_file(file, source.kind, config, stage)
        if twice := sorted(trees.keys() & params.keys()):
            raise ValueError(
                f"{file.path} holds {twice[0]}, and so does another file; a folder must have each "
                "module only once"
            )
        trees |= params
        accounts.append(own)
    module = "all"
    if PHASES[kind.phase].modular:
        module = "+".join(map(str, sorted(map(stage_number, trees))))
    # As if a run of that phase had trained the weights from scratch.
    made = dataclasses.replace(
        config,
        phase=kind.phase,
        module=module,
        sources=SourcesConfig(fresh=config.sources.fresh),
        init=InitConfig(),
        recipes={},
    )
    origin = str(source.files[0].path.parent if several else source.files[0].path)
    return Pretrained(source.kind, made, {kind.role: trees}, join(*accounts), origin)


def find_stage(file: File, kind: Kind, config: Config, *, of_many: bool) -> int:
    """The stage that a file of a single module holds.

    The evidence is config.module, the file's own block_index or name, tensors that only the first
    or the last stage has and, for several files in a folder, the number at the end of the name.

    Raises:
      ValueError: if there is no evidence, or it is contradictory.
    """
    count, names = len(kind.depths(config)), kind.family.files
    if config.module != "all" and (len(config.modules()) != 1 or of_many):
        raise ValueError(
            f"config.module={config.module!r} must be one number for a single file of a module, "
            "or 'all' for a folder of them"
        )
    # A file of several stages has both embedding and head, so they do not tell which one is meant.
    index, own = file.plain.get("block_index"), () if _is_of_several(file.tensors) else file.tensors
    # Names that the original's scripts give to NAC students; mediator 1 is stage 1.
    student = re.fullmatch(r"(ReadIn|Mediator|ReadOut)Student(?:_(\d+))?", file.path.stem)
    ends = {"ReadIn": 0, "ReadOut": count - 1}
    # Only in a folder of modules: a single name may end in anything, such as an image size.
    number = re.search(r"(\d+)$", file.path.stem) if of_many else None
    words = {
        "config.module": None if config.module == "all" else config.modules()[0],
        "its block_index": index if isinstance(index, int) else None,
        "its name": student and ends.get(student[1], student[2] and int(student[2])),
        "its embedding": 0 if any(name in own for name in names.first) else None,
        "its head": count - 1 if any(name in own for name in names.last) else None,
        "the number in its name": number and int(number[1]),
    }
    stated = {word: stage for word, stage in words.items() if stage is not None}
    if not stated:
        raise ValueError(
            f"{file.path} does not say which of the {count} modules it holds: give "
            f"--config.module=K, from 0 to {count - 1}"
        )
    if len(set(stated.values())) > 1:
        raise ValueError(
            f"{file.path}: contradictory evidence of which module it holds, {stated}; modules are "
            "numbered from 0"
        )
    stage = next(iter(stated.values()))
    if not 0 <= stage < count:
        raise ValueError(
            f"{file.path} holds module {stage}, but config.{kind.section} has {count}, numbered "
            "from 0; give the config that it was made with"
        )
    return stage


def without_fresh(
    shapes: Mapping[str, Any], kind: Kind, config: Config, there: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The shapes without those that config.sources.fresh names, and the paths of the latter; paths
    in `there` are kept."""
    flat, fresh = traverse_util.flatten_dict(shapes, sep="/"), config.sources.fresh
    named = [path for path in flat if fresh and re.fullmatch(fresh, f"{kind.role}/{path}")]
    out = [path for path in named if path not in there]
    kept = {path: shape for path, shape in flat.items() if path not in out}
    return traverse_util.unflatten_dict(kept, sep="/"), out


def _files(path: Path) -> list[Path]:
    if not path.is_dir() or weights_file(path):
        return [path]
    suffixes = (".safetensors", *TORCH_SUFFIXES)
    # If there are none, `read_weights` raises an error that says what the folder holds.
    return sorted(file for file in path.iterdir() if file.suffix in suffixes) or [path]


def _read(path: Path, weights: str) -> File:
    # The final dot distinguishes the prefix of a network from the key of a training checkpoint.
    prefix = weights if weights.endswith(".") else ""
    stored = read_weights(path, weights="" if prefix else weights)
    markers = {kind.family.files.marker for kind in KINDS.values()}
    prefix = choose_prefix(markers, stored.tensors, prefix, str(path))
    tensors, others = take_prefix(stored.tensors, prefix)
    plain = read_plain(path) if path.is_file() else {}
    beside = read_beside(path)
    account = join(Account((), notes=(*stored.notes, *beside.notes)), others)
    return File(path, tensors, plain, beside, account)


def _load_file(
    file: File, name: str, config: Config, stage: int | None
) -> tuple[dict[str, Any], Account]:
    kind = KINDS[name]
    own, others = _own(file.tensors, stage)
    table = kind.table(config, stage)
    shapes, fresh = without_fresh(kind.shapes(config, stage), kind, config)
    if config.sources.fresh and not fresh:
        raise ValueError(
            f"config.sources.fresh={config.sources.fresh!r} matches none of the parameters, such "
            f"as {kind.role}/{list(table.entries)[-1]}"
        )
    # The file may have these tensors all the same; they are then accounted for as left out.
    left = {re.escape(name) for path in fresh for name in table.entries[path].names}
    reasons = dict.fromkeys(sorted(left), "config.sources.fresh")
    params, account = read(
        dataclasses.replace(table, left_out={**table.left_out, **reasons}),
        own,
        shapes=shapes,
        file=str(file.path),
        what=f"kind={name!r}",
        advice=lambda problems: _advice(problems, own, kind, config),
    )
    taken = tuple((tensor, f"{kind.role}/{path}", s) for tensor, path, s in account.taken)
    notes = tuple(f"{kind.role}/{path} is left out: config.sources.fresh" for path in fresh)
    params = as_float32(params, str(file.path))
    account = dataclasses.replace(account, taken=taken, notes=(*account.notes, *notes))
    return params, join(file.others, Account((), dropped=others), account)


def _advice(problems: list[str], state: Tensors, kind: Kind, config: Config) -> str:
    """Advice about a file that does not fit, for the error message."""
    lines, section = [], f"config.{kind.section}"
    is_vit = kind.family.files.sizes is not None
    if is_vit and (foreign := foreign_parts(state)):
        lines.append(foreign)
    if is_vit and not kind.form.single and is_headless(state):
        lines.append(
            "the file has no classifier (head.weight), as timm saves it with num_classes=0, but "
            "the logits of a teacher or meta model need its head: take the file with it, or add "
            "head.weight and head.bias of a classifier that was trained on this network. To "
            "convert it without a head, for uses that do not read it or train a new one (modules "
            "other than the last, config.init.upcycle), give "
            f"--config.sources.fresh='{kind.role}/stage_\\d+/head/.*'"
        )
    # Problems begin with the name of their tensor.
    names = [problem.split()[0] for problem in problems]
    lacks_head = {name for name in names if name.startswith("head.") and name not in state}
    if not lines or not all(name in lacks_head or foreign_parts([name]) for name in names):
        fields = [field for field, regex in PARTS.items() if is_vit and find(names, regex)]
        shown = ", ".join(f"{section}.{field}" for field in fields)
        lines.append(
            f"give the {section} and config.data of the network in the file (its position table is "
            "resized by the phase that takes it)" + (f", including {shown}" if shown else "")
        )
    blocks, depths = count_blocks(state), kind.depths(config)
    if blocks and not kind.form.single and blocks != sum(depths):
        lines.append(
            f"the file has {blocks} blocks, but {section}.depths={depths} have {sum(depths)}"
        )
    return "; ".join(lines)


def _is_of_several(tensors: Tensors) -> bool:
    """True for tensors that are listed by stage, for a network of several stages."""
    return any(re.match(r"stages\.[1-9]", name) for name in tensors)


def _own(tensors: Tensors, stage: int | None) -> tuple[Tensors, tuple[tuple[str, str], ...]]:
    """The tensors of a stage under the stage's own names, and the other tensors, if the file holds
    a network of several stages."""
    if stage is None or not _is_of_several(tensors):
        return tensors, ()
    prefix = f"stages.{stage}."
    own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    others = (n for n in tensors if not n.startswith(prefix))
    return own, tuple((name, "of another stage, or listed twice") for name in others)
