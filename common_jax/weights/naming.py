"""Removes what frameworks add around a network's tensors: prefixes of their names, and the nested
dictionaries of a training checkpoint."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from common_jax.untrusted import RefusedError, brief, plain
from common_jax.weights.torch_pickle import (
    CONJUGATED,
    EXPORT,
    NEGATED,
    Opaque,
    Scripted,
    Tensor,
)

# Prefix that data-parallel wrappers add to every name.
PARALLEL = "module."
COUNT = "n_averaged"  # in the state of torch's AveragedModel, which also adds `PARALLEL`
# Inserted into names, at any depth, by torch.compile, FSDP and activation checkpointing.
INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Keys of the parameters in training checkpoints of CLIPTrans (beside "optimizer", "scaler",
# "epoch" and "best_bleu_test"), Lightning and OpenCLIP, m2mKD's modules, and DeepSpeed.
WRAPPERS = ("model", "state_dict", "block_state_dict", "module", "model_state_dict")
# Keys of running averages: DeiT's "model_ema", timm's "state_dict_ema", "ema".
AVERAGE = re.compile(r"(.*[._])?(ema|swa|averaged?|shadow)([._].*)?")
EXPORT_HINT = f"with PyTorch: {EXPORT}"
# Regex of what rebuilds a tensor in PyTorch -> what it is, and how to get a plain one.
OTHER_TENSORS = {
    r"torch\._utils\._rebuild_qtensor|torch\.Q.*Storage": ("a quantised tensor", "x.dequantize()"),
    r"torch\._utils\._rebuild_sparse.*": ("a sparse tensor", "x.to_dense()"),
    r"torch\._utils\._rebuild_nested.*": ("a nested tensor", "x.unbind()"),
    r"torch\._utils\._rebuild_meta_tensor.*": (
        "a meta tensor, which has no values",
        "x of a model whose weights were loaded",
    ),
    r"torch\._tensor\._rebuild_from_type.*": (
        "a tensor of a subclass",
        "x.as_subclass(torch.Tensor), or x.dequantize() of a quantised one",
    ),
    CONJUGATED: ("a tensor that is marked as conjugate", "x.resolve_conj()"),
    NEGATED: ("a tensor that is marked as negative", "x.resolve_neg()"),
}
# Limits on the nesting of dictionaries, and on the characters of a key and of a name.
DEPTH, LONGEST_KEY, LONGEST_NAME = 3, 100, 1000


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A dictionary of tensors by name, and notes on how it was chosen."""

    tensors: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def plain_names(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Removes what frameworks insert into names; returns the tensors and notes on what was removed.
    Raises RefusedError if two tensors then have the same name."""
    result, notes = dict(tensors), []
    if COUNT in result and all(name.startswith(PARALLEL) for name in result if name != COUNT):
        del result[COUNT]
        notes.append(f"{COUNT!r} was left out: torch's AveragedModel counts its updates there")
    for word in (*INSERTED, PARALLEL):
        renamed = {_without(word, name): tensor for name, tensor in result.items()}
        if len(renamed) != len(result):
            raise RefusedError(f"holds tensors both with and without the prefix {word!r}")
        if count := sum(_without(word, name) != name for name in result):
            notes.append(f"{word!r} was removed from {count} names")
        result = renamed
    return result, tuple(notes)


def choose(top: Any, key: str = "") -> Chosen:
    """Chooses the dictionary of tensors in a file's content.

    Args:
      top: a state dict, or a training checkpoint with one or several.
      key: key of the one to read, such as "model_ema" or "state.model"; "" to choose automatically.

    Raises RefusedError if there is none, if `key` is missing, or if the choice is ambiguous because
    of a running average or a second one with the same names.
    """
    if not isinstance(top, dict):
        what = "one tensor" if isinstance(top, Tensor) else _kind(top)
        raise RefusedError(f"holds {what}, not tensors by name; {EXPORT_HINT}")
    dictionaries = dict(_dictionaries(top, DEPTH, "", set()))
    if key:
        if key not in dictionaries:
            there = ", ".join(map(brief, [*dictionaries][:5])) or "none"
            raise RefusedError(
                f"holds no tensors by name under weights={brief(key)}; keys that do: {there}"
            )
        return Chosen(_pure(dictionaries[key]), (f"the weights are those under {key!r}",))
    averages = [name for name in dictionaries if AVERAGE.fullmatch(name)]
    known = [*(name for name in WRAPPERS if name in dictionaries), *averages]
    if not known:
        return Chosen(_pure(top, dictionaries))
    first, plain_first = known[0], _plain(dictionaries[known[0]])
    twins = [
        name
        for name, tensors in dictionaries.items()
        if name != first and (name in averages or _alike(_plain(tensors), plain_first))
    ]
    if twins:
        names = " and ".join(map(brief, [first, *twins][:5]))
        raise RefusedError(
            f"holds weights under {names}, which may differ (one may be a running average): choose "
            f"with weights=KEY, such as weights={plain(twins[-1])} (--weights=KEY of a command, "
            "--config.sources.weights=KEY of a run)"
        )
    others = [name for name in dictionaries if name != first and not name.startswith(f"{first}.")]
    others += [name for name, value in top.items() if isinstance(value, Tensor)]
    note = f"the weights are those under {first!r}"
    if others:
        note += f"; not read: {', '.join(map(brief, others[:5]))}"
    return Chosen(_pure(dictionaries[first]), (note,))


def require_plain(name: Any, value: Any) -> None:
    """Raises RefusedError, with the way to a plain tensor, for one in another form."""
    stored = value.name if isinstance(value, Opaque) else ""
    for regex, (kind, way_out) in OTHER_TENSORS.items():
        if re.fullmatch(regex, stored):
            raise RefusedError(
                f"holds {brief(name)}, {kind}; save plain tensors instead, with PyTorch: {way_out}"
            )


def require_name(name: str) -> None:
    """Raises RefusedError if a tensor's name is too long."""
    if len(name) > LONGEST_NAME:
        raise RefusedError(f"holds a name of {len(name)} characters, {plain(name[:40])}...")


def _without(word: str, name: str) -> str:
    return name.removeprefix(word) if word == PARALLEL else name.replace(word, "")


def _dictionaries(value: dict, depth: int, path: str, seen: set[int]) -> Iterator[tuple[str, dict]]:
    """Dictionaries of tensors below `value`, by dotted key. Yields each once, since a small file
    can refer to the same one many times."""
    for key, inner in value.items():
        if not (isinstance(key, str) and isinstance(inner, dict)) or id(inner) in seen:
            continue
        if key.startswith("optim") or len(key) > LONGEST_KEY:
            continue
        seen.add(id(inner))
        named = all(isinstance(name, str) for name in inner)
        if named and any(isinstance(x, Tensor) for x in inner.values()):
            yield path + key, inner
        elif depth > 1:
            yield from _dictionaries(inner, depth - 1, f"{path}{key}.", seen)


def _plain(tensors: Mapping[str, Any]) -> set[str]:
    """The names that `plain_names` would leave."""
    names = set(tensors)
    for word in (*INSERTED, PARALLEL):
        names = {_without(word, name) for name in names}
    return names


def _alike(a: set[str], b: set[str]) -> bool:
    """True if most names of the larger set are in the other."""
    return 2 * len(a & b) > max(len(a), len(b))


def _pure(tensors: Mapping[str, Any], others: Iterable[str] = ()) -> Mapping[str, Tensor]:
    for name, value in tensors.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            keys = ", ".join(map(plain, [*others][:5]))
            way_out = f"choose with weights=KEY, KEY one of {keys}" if keys else EXPORT_HINT
            require_plain(name, value)
            raise RefusedError(
                f"holds {brief(name)}, {_kind(value)}, where only tensors by name are expected, "
                f"at the top or under one of {WRAPPERS}; {way_out}"
            )
        require_name(name)
    return tensors


def _kind(value: Any) -> str:
    """A value's type, for messages."""
    if isinstance(value, Opaque | Scripted):
        return f"a {plain(value.name)}"
    return f"a {type(value).__name__.lstrip('_')}"
