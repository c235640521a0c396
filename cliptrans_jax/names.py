"""Tables between published tensor names and our parameter paths, read in both directions.

A table has one `Entry` a parameter of ours. Reading is strict: a tensor that no entry asks for, a
tensor that is missing and one of another shape all stop it, each by name. Plain numpy; both
directions move numbers and change none, so that a round trip is the identity.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from common_jax.weights import Account, list_problems

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one parameter is made of published tensors.

    Attributes:
      names: the tensors.
      read: (tensors in the order of `names`) -> parameter.
      write: parameter -> tensors in that order.
    """

    names: tuple[str, ...]
    read: Callable[..., np.ndarray]
    write: Callable[[np.ndarray], tuple[np.ndarray, ...]]


Table = Mapping[str, Entry]  # by our path "encoder/layer_0/mlp/up/kernel"


def copy(name: str) -> Entry:
    """A tensor that is a parameter as it is."""
    return Entry((name,), lambda x: x, lambda x: (x,))


def transpose(name: str) -> Entry:
    """A linear layer's [out, in] as a kernel (in, out)."""
    return Entry((name,), np.transpose, lambda x: (x.T,))


def convolution(name: str) -> Entry:
    """A convolution's [out, in, rows, columns] as a kernel (rows, columns, in, out)."""
    return Entry((name,), lambda x: x.transpose(2, 3, 1, 0), lambda x: (x.transpose(3, 2, 0, 1),))


def split_heads(names: tuple[str, ...], heads: int) -> Entry:
    """Linear layers' [D, D] side by side as one kernel (D, len(names), H, K), for queries, keys
    and values of one attention."""

    def read(*tensors: np.ndarray) -> np.ndarray:
        return np.stack([x.T.reshape(x.shape[1], heads, -1) for x in tensors], axis=1)

    def write(kernel: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(kernel[:, i].reshape(kernel.shape[0], -1).T for i in range(len(names)))

    return Entry(names, read, write)


def split_head_biases(names: tuple[str, ...], heads: int) -> Entry:
    """Their biases, [D] each, as (len(names), H, K)."""

    def read(*tensors: np.ndarray) -> np.ndarray:
        return np.stack([x.reshape(heads, -1) for x in tensors])

    def write(bias: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(part.reshape(-1) for part in bias)

    return Entry(names, read, write)


def join_heads(name: str, heads: int) -> Entry:
    """The output layer's [D, D] as a kernel (H, K, D)."""

    def read(x: np.ndarray) -> np.ndarray:
        return x.T.reshape(heads, -1, x.shape[0])

    return Entry((name,), read, lambda x: (x.reshape(-1, x.shape[-1]).T,))


def linear(source: str, target: str) -> dict[str, Entry]:
    """Entries of a linear layer with bias."""
    return {
        f"{target}/kernel": transpose(f"{source}.weight"),
        f"{target}/bias": copy(f"{source}.bias"),
    }


def norm(source: str, target: str) -> dict[str, Entry]:
    """Entries of a LayerNorm."""
    return {
        f"{target}/scale": copy(f"{source}.weight"),
        f"{target}/bias": copy(f"{source}.bias"),
    }


def self_attention(
    sources: tuple[str, str, str], out: str, target: str, *, heads: int
) -> dict[str, Entry]:
    """Entries of `common_jax.nn.attention.SelfAttention`.

    Args:
      sources: names of the linear layers of queries, keys and values.
      out: name of the output layer.
      target: path of the attention.
      heads: their number.
    """
    return {
        f"{target}/qkv/kernel": split_heads(tuple(f"{s}.weight" for s in sources), heads),
        f"{target}/qkv/bias": split_head_biases(tuple(f"{s}.bias" for s in sources), heads),
        f"{target}/out/kernel": join_heads(f"{out}.weight", heads),
        f"{target}/out/bias": copy(f"{out}.bias"),
    }


def stacked_attention(source: str, target: str, *, heads: int) -> dict[str, Entry]:
    """The same of torch.nn.MultiheadAttention, whose queries, keys and values are the rows of one
    tensor `in_proj_weight` [3D, D]."""

    def read(x: np.ndarray) -> np.ndarray:  # [3D, ...] to (..., 3, H, K)
        return np.moveaxis(x.reshape(3, heads, -1, *x.shape[1:]), (0, 1, 2), (-3, -2, -1))

    def write(x: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = np.moveaxis(x, (-3, -2, -1), (0, 1, 2))
        return (parts.reshape(-1, *x.shape[:-3]),)

    return {
        f"{target}/qkv/kernel": Entry((f"{source}.in_proj_weight",), read, write),
        f"{target}/qkv/bias": Entry((f"{source}.in_proj_bias",), read, write),
        f"{target}/out/kernel": join_heads(f"{source}.out_proj.weight", heads),
        f"{target}/out/bias": copy(f"{source}.out_proj.bias"),
    }


def below(table: Table, *, source: str, target: str) -> dict[str, Entry]:
    """The table with every tensor name and every path put under a prefix, such as "mbart." and
    "mbart/"."""
    return {
        target + path: dataclasses.replace(entry, names=tuple(source + n for n in entry.names))
        for path, entry in table.items()
    }


def read(
    table: Table,
    tensors: Tensors,
    *,
    shapes: Mapping[str, Any],
    file: str,
    aliases: Mapping[str, str] | None = None,
    dropped: Mapping[str, str] | None = None,
    zeros: Collection[str] = (),
) -> tuple[dict[str, Any], Account]:
    """Our parameters from published tensors.

    Args:
      table: an entry for every parameter in `shapes`.
      tensors: name -> array.
      shapes: nested dict of what has a `shape`, as `jax.eval_shape` of the network's init gives.
      file: what to call the tensors' origin in messages.
      aliases: name -> name of the tensor that it must equal if both are there, and whose place it
        takes if that one is missing.
      dropped: regex of whole names -> why they are not taken.
      zeros: names of tensors that are zeros where they are missing; the account says so.

    Raises:
      ValueError: naming every tensor that is missing, unknown, of another shape, or unequal to what
        it is an alias of.
    """
    tensors, taken, problems, notes = dict(tensors), [], [], []
    same = _resolve(tensors, aliases or {}, problems)
    flat = traverse_util.flatten_dict(shapes, sep="/")
    assert set(table) == set(flat), sorted(set(table) ^ set(flat))
    absent = set(zeros) - tensors.keys()
    params = {}
    for path, entry in table.items():
        if len(entry.names) == 1 and entry.names[0] in absent:
            params[path] = np.zeros(flat[path].shape, np.float32)
            notes.append(f"{entry.names[0]} is not in the file: zeros")
            continue
        if missing := [name for name in entry.names if name not in tensors]:
            problems += [f"{name} is missing, for {path} {flat[path].shape}" for name in missing]
            continue
        parts = [np.asarray(tensors[name]) for name in entry.names]
        wanted = [part.shape for part in entry.write(_hollow(flat[path].shape))]
        for name, part, shape in zip(entry.names, parts, wanted, strict=True):
            if part.shape != shape:
                problems.append(f"{name} is {part.shape} and should be {shape}")
            taken.append((name, path, part.shape))
        if [part.shape for part in parts] == wanted:
            params[path] = entry.read(*parts)
    known = {name for name, _, _ in taken}
    left = []
    for name in sorted(set(tensors) - known):
        reason = next((why for rx, why in (dropped or {}).items() if re.fullmatch(rx, name)), None)
        if reason is not None:
            left.append((name, reason))
        elif not any(name in entry.names for entry in table.values()):
            problems.append(f"{name} {np.shape(tensors[name])} has no place")
    if problems:
        raise ValueError(
            f"{file} does not hold this model:{list_problems(problems)}\n"
            "check that the model's config (sizes, mapping network, prefix length) is the file's"
        )
    account = Account(tuple(taken), tuple(sorted(same.items())), tuple(left), tuple(notes))
    return traverse_util.unflatten_dict(params, sep="/"), account


def write(table: Table, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Published tensors from our parameters; `table` may hold entries of more than `params`."""
    tensors = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        entry = table[path]
        tensors |= dict(zip(entry.names, entry.write(np.asarray(value)), strict=True))
    return tensors


def _hollow(shape: tuple[int, ...]) -> np.ndarray:
    """An array of a shape that takes no memory."""
    return np.broadcast_to(np.float32(0), shape)


def _resolve(
    tensors: dict[str, np.ndarray], aliases: Mapping[str, str], problems: list[str]
) -> dict[str, str]:
    """Takes aliases out of `tensors`, filling in what they stand for; returns those taken out."""
    same = {}
    for alias, name in aliases.items():
        if alias not in tensors:
            continue
        tensor = tensors.pop(alias)
        if name not in tensors:
            tensors[name] = tensor
        elif not np.array_equal(tensors[name], tensor):
            problems.append(f"{alias} should equal {name} and does not")
        same[alias] = name
    return same
