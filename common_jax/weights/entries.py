"""Entries: conversions between one parameter and its published tensors, in both directions.

They rearrange values without changing them, so a round trip is the identity. Plain numpy.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """The conversion between one parameter and its published tensors.

    Attributes:
      names: names of the tensors.
      read: (tensors in the order of `names`) -> parameter. May raise ValueError for tensors that
        contradict each other.
      write: parameter -> tensors in that order.
      forms: alternative tensors in some files; read, never written.
      optional: whether some networks of the table lack the parameter. Only used to recognise kinds;
        the network's shapes decide whether a parameter is required.
      fill: value of the parameter if a file lacks it; None if it is required.
    """

    names: tuple[str, ...]
    read: Callable[..., np.ndarray]
    write: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    forms: tuple["Entry", ...] = ()
    optional: bool = False
    fill: float | None = None


Entries = Mapping[str, Entry]  # by our path, such as "encoder/layer_0/mlp/up/kernel"


def copy(name: str) -> Entry:
    """A tensor that already has the parameter's layout."""
    return Entry((name,), lambda x: x, lambda x: (x,))


def transpose(name: str) -> Entry:
    """A linear layer's [out, in] as a kernel (in, out)."""
    return Entry((name,), np.transpose, lambda x: (x.T,))


def convolution(name: str) -> Entry:
    """A convolution's [out, in, rows, columns] as a kernel (rows, columns, in, out)."""
    return Entry((name,), lambda x: x.transpose(2, 3, 1, 0), lambda x: (x.transpose(3, 2, 0, 1),))


def patches(name: str, channels: int = 3) -> Entry:
    """A convolution [D, channels, p, p] of stride p as the kernel (p * p * channels, D) of a matrix
    product."""
    whole = convolution(name)

    def write(kernel: np.ndarray) -> tuple[np.ndarray, ...]:
        rows, width = kernel.shape
        side = math.isqrt(rows // channels)
        if side * side * channels != rows:
            raise ValueError(
                f"a patch kernel of {rows} rows is not a square patch with channels={channels}"
            )
        return whole.write(kernel.reshape(side, side, channels, width))

    return Entry(whole.names, lambda x: whole.read(x).reshape(-1, x.shape[0]), write)


def split_heads(names: tuple[str, ...], heads: int) -> Entry:
    """The [D, ...] of several linear layers, such as queries, keys and values, as one
    (..., len(names), H, K)."""
    stacked = stacked_heads("", heads, parts=len(names))
    return Entry(
        names,
        lambda *tensors: stacked.read(np.concatenate(tensors)),
        lambda x: tuple(np.split(*stacked.write(x), len(names))),
    )


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
    """Entries of `common_jax.nn.attention.SelfAttention` at the path `target`, from the linear
    layers `sources` of queries, keys and values, and `out`."""
    return {
        f"{target}/qkv/kernel": split_heads(tuple(f"{s}.weight" for s in sources), heads),
        f"{target}/qkv/bias": split_heads(tuple(f"{s}.bias" for s in sources), heads),
        f"{target}/out/kernel": join_heads(f"{out}.weight", heads),
        f"{target}/out/bias": copy(f"{out}.bias"),
    }


def stacked_heads(name: str, heads: int, parts: int = 3) -> Entry:
    """One tensor [parts * D, ...] with rows of queries, keys and values, or of other `parts`, as
    (..., parts, H, K)."""

    def read(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x.reshape(parts, heads, -1, *x.shape[1:]), (0, 1, 2), (-3, -2, -1))

    def write(x: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = math.prod(x.shape[-3:])
        return (np.moveaxis(x, (-3, -2, -1), (0, 1, 2)).reshape(rows, *x.shape[:-3]),)

    return Entry((name,), read, write)


def single_heads(name: str, heads: int) -> Entry:
    """A tensor [D, ...] with rows of queries only, as (..., H, K)."""
    stacked = stacked_heads(name, heads, parts=1)
    return Entry(
        stacked.names,
        lambda x: stacked.read(x).squeeze(-3),
        lambda x: stacked.write(np.expand_dims(x, -3)),
    )


def stacked_attention(source: str, target: str, *, heads: int) -> dict[str, Entry]:
    """Entries of torch.nn.MultiheadAttention, which stacks queries, keys and values in the rows of
    one tensor `in_proj_weight`."""
    return {
        f"{target}/qkv/kernel": stacked_heads(f"{source}.in_proj_weight", heads),
        f"{target}/qkv/bias": stacked_heads(f"{source}.in_proj_bias", heads),
        f"{target}/out/kernel": join_heads(f"{source}.out_proj.weight", heads),
        f"{target}/out/bias": copy(f"{source}.out_proj.bias"),
    }


def below(entries: Entries, *, source: str, target: str) -> dict[str, Entry]:
    """The entries with `source` prepended to every tensor name and `target` to every path, such as
    "mbart." and "mbart/"."""
    return {target + path: _renamed(entry, source) for path, entry in entries.items()}


def optional(entries: Entries) -> dict[str, Entry]:
    """The entries, all made optional."""
    return {path: dataclasses.replace(entry, optional=True) for path, entry in entries.items()}


def tied(entries: Entries, first: str, others: tuple[str, ...]) -> dict[str, Entry]:
    """Entries of a shared module that a file lists several times: under `first`, such as
    "propagators.0.", the prefix of all names in `entries`, and under each of `others`."""
    return {path: _tie(entry, first, others) for path, entry in entries.items()}


def _tie(entry: Entry, first: str, others: tuple[str, ...]) -> Entry:
    (name,) = entry.names
    names = (name, *(name.replace(first, other, 1) for other in others))

    def read(*tensors: np.ndarray) -> np.ndarray:
        for other, tensor in zip(names, tensors, strict=True):
            if not np.array_equal(tensor, tensors[0]):
                raise ValueError(f"{other} should equal {name} and does not")
        return entry.read(tensors[0])

    return dataclasses.replace(
        entry, names=names, read=read, write=lambda x: entry.write(x) * len(names)
    )


def _renamed(entry: Entry, source: str) -> Entry:
    return dataclasses.replace(
        entry,
        names=tuple(source + name for name in entry.names),
        forms=tuple(_renamed(form, source) for form in entry.forms),
    )
