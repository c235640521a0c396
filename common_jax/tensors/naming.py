"""What frameworks put around a network's tensors: wrappers in their names, and dictionaries of them
under keys of a training checkpoint."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# Put before every name by a run on several devices.
PARALLEL = "module."
# Put into names, at any depth, by torch.compile, FSDP and activation checkpointing.
INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Keys that a training checkpoint keeps its parameters under: CLIPTrans writes "model" beside
# "optimizer", "scaler", "epoch" and "best_bleu_test", m2mKD the third in files of a module,
# Lightning and OpenCLIP the second, DeepSpeed the fourth.
WRAPPERS = ("model", "state_dict", "block_state_dict", "module", "model_state_dict")
# How keys of running averages are told: DeiT's "model_ema", timm's "state_dict_ema", "ema".
AVERAGE = re.compile(r"(.*[._])?(ema|swa|averaged?|shadow)([._].*)?")
# How deep a dictionary of tensors may stand in others.
DEPTH = 3


@dataclasses.dataclass(frozen=True)
class Chosen:
    """One dictionary of tensors, and how it was chosen.

    Attributes:
      tensors: by their names.
      notes: which one it is and what else is there, where that is not plain.
    """

    tensors: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def plain_names(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Tensors by their names without what frameworks put into them, and notes about that.

    Raises:
      ValueError: where two tensors are then called alike.
    """
    plain, notes = dict(tensors), []
    for word in INSERTED:
        if count := sum(word in name for name in plain):
            plain = _renamed(plain, lambda name, word=word: name.replace(word, ""), word)
            notes.append(f"{word!r} was taken out of {count} names")
    if count := sum(name.startswith(PARALLEL) for name in plain):
        plain = _renamed(plain, lambda name: name.removeprefix(PARALLEL), PARALLEL)
        notes.append(f"the prefix {PARALLEL!r} was taken off {count} names")
    return plain, tuple(notes)


def choose(top: Any, is_tensor: Callable[[Any], bool], key: str = "") -> Chosen:
    """The dictionary of tensors in what a file holds.

    Args:
      top: a state dict, or a training checkpoint that holds one or several.
      is_tensor: whether a value is one.
      key: of the one that is meant, such as "model_ema" or "state.model"; "" where only one is
        there, or one alone is a network's.

    Raises:
      ValueError: without one, for a key that is not there, and where it is not plain which one is
        meant: with a running average, or a student and a teacher, under the same names.
    """
    if not isinstance(top, dict):
        what = "one tensor" if is_tensor(top) else f"a {_type(top)}"
        raise ValueError(f"holds {what}, and not tensors by their names")
    found = dict(_dictionaries(top, is_tensor, DEPTH, "", set()))
    if key:
        if key not in found:
            there = ", ".join(map(repr, found)) or "none"
            raise ValueError(
                f"holds no tensors by their names under weights={key!r}; keys of such: {there}"
            )
        return Chosen(_pure(found[key], is_tensor), (f"the weights are those under {key!r}",))
    averages = [name for name in found if AVERAGE.fullmatch(name)]
    known = [*(name for name in WRAPPERS if name in found), *averages]
    if not known:
        return Chosen(_pure(top, is_tensor, found))
    first = known[0]
    twins = [
        name
        for name in found
        if name != first and (name in averages or _alike(found[name], found[first]))
    ]
    if twins:
        names = [first, *twins]
        raise ValueError(
            f"holds weights under {' and '.join(map(repr, names[:5]))}, which may differ (one may "
            f"be a running average): choose with weights=KEY, such as weights={names[-1]} "
            "(--weights=KEY of a command, --config.sources.weights=KEY of a run)"
        )
    others = [name for name in found if name != first and not name.startswith(f"{first}.")]
    note = f"the weights are those under {first!r}"
    if others:
        note += f"; not read: {', '.join(map(repr, others[:5]))}"
    return Chosen(_pure(found[first], is_tensor), (note,))


def _renamed(
    tensors: Mapping[str, Any], rename: Callable[[str], str], prefix: str
) -> dict[str, Any]:
    plain = {rename(name): tensor for name, tensor in tensors.items()}
    if len(plain) != len(tensors):
        raise ValueError(f"holds tensors both with and without the prefix {prefix!r}")
    return plain


def _dictionaries(
    value: dict, is_tensor: Callable[[Any], bool], depth: int, path: str, seen: set[int]
) -> Iterator[tuple[str, dict]]:
    """Dictionaries below `value` that hold tensors by names, by their dotted keys; each once, since
    a small file can refer to one many times."""
    for key, inner in value.items():
        if not (isinstance(key, str) and isinstance(inner, dict)) or key.startswith("optim"):
            continue
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        if any(is_tensor(x) for x in inner.values()) and all(isinstance(k, str) for k in inner):
            yield path + key, inner
        elif depth > 1:
            yield from _dictionaries(inner, is_tensor, depth - 1, f"{path}{key}.", seen)


def _alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether most names of one are the other's, but for wrappers."""
    plain = [{re.sub(r"^module\.|_orig_mod\.", "", name) for name in tensors} for tensors in (a, b)]
    return 2 * len(plain[0] & plain[1]) > max(map(len, plain))


def _pure(
    tensors: Mapping[str, Any], is_tensor: Callable[[Any], bool], others: Iterable[str] = ()
) -> Mapping[str, Any]:
    for name, value in tensors.items():
        if not (isinstance(name, str) and is_tensor(value)):
            keys = ", ".join(list(others)[:5])
            hint = f"; choose with weights=KEY, KEY one of {keys}" if keys else ""
            raise ValueError(
                f"holds {name!r}, a {_type(value)}, where tensors by their names are expected, "
                f"alone or under one of {WRAPPERS}{hint}"
            )
    return tensors


def _type(value: Any) -> str:
    return type(value).__name__.lstrip("_")
