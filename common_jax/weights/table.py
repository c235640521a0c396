"""Tables of tensor names: a strict reader into our parameters, a writer that uses the same table,
and the recognition of kinds of networks by their tensors' names."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from common_jax.untrusted import brief
from common_jax.weights.account import Account, fold, list_problems
from common_jax.weights.entries import Entries, Entry, below
from common_jax.weights.files import NARROW

Tensors = Mapping[str, np.ndarray]
MOST_PREFIXES = 8  # limit on prefixes to try, since a file may have any number
FLOATS = ("float32", "float64", *NARROW)


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of one network's tensors in one kind of file.

    Attributes:
      entries: by our path, one for every parameter that such a network may have.
      aliases: name -> name of an equal tensor, which the alias replaces if it is missing.
      left_out: regex of full names -> why they are not read.
    """

    entries: Entries
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def below(self, *, source: str, target: str) -> "Table":
        """The table of a network within another, such as under "mbart." and "mbart/"."""
        return Table(
            below(self.entries, source=source, target=target),
            {source + alias: source + name for alias, name in self.aliases.items()},
            {f"{re.escape(source)}(?:{regex})": why for regex, why in self.left_out.items()},
        )


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Published weights, converted to our parameters.

    Attributes:
      kind: key in its package's table of kinds.
      config: the network's sizes, or a run's config that has them.
      params: nested dict of float32 numpy arrays.
      account: what became of every tensor.
      source: path or name of the file.
    """

    kind: str
    config: Any
    params: Mapping[str, Any]
    account: Account
    source: str


def read(
    table: Table,
    tensors: Tensors,
    *,
    shapes: Mapping[str, Any],
    file: str,
    what: str = "this model",
    advice: Callable[[list[str]], str] = lambda _: "give the config of the model in the file",
) -> tuple[dict[str, Any], Account]:
    """Converts published tensors to our parameters, keeping the file's dtypes.

    Args:
      table: a table with an entry for every parameter in `shapes`.
      tensors: name -> array.
      shapes: nested dict of leaves with a `shape`, such as `jax.eval_shape` of the network's init.
      file: name of the tensors' file, for messages.
      what: name of the expected network, for messages.
      advice: problems, one line per tensor -> how to fix them, for the message.

    Raises:
      ValueError: naming every tensor that is missing, unknown, of the wrong shape, or different
        from a tensor that it should equal.
    """
    # Problems are collected rather than raised one by one: files take minutes to read.
    tensors, problems = dict(tensors), []
    same = _resolve(tensors, table.aliases, problems)
    # Tables have entries for all variants of a network; `shapes` belongs to one of them.
    flat = traverse_util.flatten_dict(shapes, sep="/")
    assert flat.keys() <= table.entries.keys(), sorted(flat.keys() - table.entries.keys())
    params, rows, notes = {}, [], []
    entries = {path: entry for path, entry in table.entries.items() if path in flat}
    for path, entry in entries.items():
        form, shape = _form(entry, tensors), flat[path].shape
        parts = {name: np.asarray(tensors[name]) for name in form.names if name in tensors}
        rows += [(name, path, part.shape) for name, part in parts.items()]
        if not parts and entry.fill is not None:
            params[path] = np.full(shape, entry.fill, np.float32)
            value = "zeros" if entry.fill == 0 else f"{entry.fill:g} everywhere"
            notes.append(f"{', '.join(entry.names)} is not in the file: {value}")
        elif wrong := _differing(parts, _tensor_shapes(form, shape), path):
            problems += wrong
        else:
            values = [*parts.values()]
            if len({x.dtype for x in values}) > 1:
                # numpy has no common type of bfloat16 and float16.
                values = [x.astype(np.float32) for x in values]
            try:
                params[path] = form.read(*values)
            except ValueError as error:
                problems.append(str(error))
    known = {name for name, _, _ in rows}
    rest = {name: x for name, x in tensors.items() if name not in known}
    left, unknown = _divide(rest, table.left_out, _other_forms(entries.values()))
    problems += unknown
    if problems:
        raise ValueError(
            f"{file} does not fit {what}:{list_problems(problems)}\n{advice(problems)}"
        )
    account = Account(tuple(rows), tuple(sorted(same.items())), left, tuple(notes))
    return traverse_util.unflatten_dict(params, sep="/"), account


def write(table: Table, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts our parameters, or a tree with the same structure such as gradients, to published
    tensors in the order of the table. Raises ValueError, naming all parameters that it lacks."""
    flat = traverse_util.flatten_dict(params, sep="/")
    if unknown := sorted(flat.keys() - table.entries.keys()):
        raise ValueError(f"there are no published names for {unknown}")
    tensors = {}
    for path, entry in table.entries.items():
        if path in flat:
            parts = entry.write(np.asarray(flat[path]))
            tensors |= dict(zip(entry.names, parts, strict=True))
    return tensors


def expected_tensors(
    table: Table, shapes: Mapping[str, Any]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our path and the shape of every tensor that `write` would return for parameters of these
    shapes."""
    flat = traverse_util.flatten_dict(shapes, sep="/")
    return {
        name: (path, shape)
        for path, entry in table.entries.items()
        if path in flat
        for name, shape in _tensor_shapes(entry, flat[path].shape).items()
    }


def as_float32(params: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The parameters in float32. Raises ValueError for dtypes other than floats, and for values
    that are not finite."""
    flat = traverse_util.flatten_dict(params, sep="/")
    if odd := [f"{path} is {x.dtype}" for path, x in flat.items() if x.dtype.name not in FLOATS]:
        raise ValueError(f"{file} holds other types than floats: {'; '.join(odd[:5])}; use another")
    wide = {path: np.asarray(x, np.float32) for path, x in flat.items()}
    if odd := [path for path, x in wide.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{file} holds values that are not finite, in {', '.join(odd[:5])}")
    return traverse_util.unflatten_dict(wide, sep="/")


def list_differences(params: Mapping[str, Any], shapes: Mapping[str, Any]) -> list[str]:
    """One line for every parameter that is missing, unknown or of the wrong shape."""
    flat, expected = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, shapes))
    lines = [f"{path} {expected[path].shape} is missing" for path in sorted(expected.keys() - flat)]
    lines += [
        f"{path} {np.shape(flat[path])} has no place" for path in sorted(flat.keys() - expected)
    ]
    return lines + [
        f"{path} is {np.shape(x)} and should be {expected[path].shape}"
        for path, x in flat.items()
        if path in expected and np.shape(x) != expected[path].shape
    ]


def misfits(table: Table, names: Collection[str]) -> list[str]:
    """One line per difference between a file's names and a table's, whatever the number of layers:
    names that the table lacks, and required names that the file lacks."""
    # Folded, since the number of layers in the table is arbitrary.
    there = {fold(name) for name in names}
    aliases = {fold(alias): fold(name) for alias, name in table.aliases.items()}
    # An alias may replace the tensor that it equals.
    there |= {name for alias, name in aliases.items() if alias in there}
    claimed, missing = set(aliases), {}
    for entry in table.entries.values():
        forms = [{fold(name) for name in form.names} for form in (entry, *entry.forms)]
        claimed.update(*forms)
        if not (entry.optional or entry.fill is not None or any(form <= there for form in forms)):
            missing |= dict.fromkeys(sorted(forms[0]))
    foreign = {
        fold(name): None
        for name in sorted(names)
        if fold(name) not in claimed and not any(re.fullmatch(rx, name) for rx in table.left_out)
    }
    return [f"{n} is missing" for n in missing] + [f"{n} has no place" for n in foreign]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A kind of network that a file may contain below a prefix of its names."""

    kind: str
    prefix: str
    misfits: tuple[str, ...]  # differences between the names there and the closest table


# (kind, marker as in `prefixes`, function that returns tables, with any number of layers)
Format = tuple[str, str, Callable[[], Iterable[Table]]]


def rank_kinds(formats: Iterable[Format], names: Collection[str]) -> list[Claim]:
    """The kinds of network that a file may contain, ranked by the shortest prefix, then by the
    fewest misfits, then in the order of `formats`."""
    claims = []
    for kind, marker, tables in formats:
        # Nested names have several prefixes with a marker; outer networks come first.
        shortest = sorted(prefixes(marker, names), key=lambda prefix: (len(prefix), prefix))
        for prefix in shortest[:MOST_PREFIXES]:
            own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            claims.append(_claim(kind, prefix, tables(), own))
    return sorted(claims, key=lambda claim: (len(claim.prefix), len(claim.misfits)))


def describe_nearest(formats: Iterable[Format], names: Collection[str]) -> str:
    """The kind with the fewest misfits and what these are, for the message about an unknown file;
    "" if more than half of the names do not fit."""
    claims = (_claim(kind, "", tables(), names) for kind, _, tables in formats)
    nearest = min(claims, key=lambda claim: len(claim.misfits))
    if 2 * len(nearest.misfits) > len({fold(name) for name in names}):
        return ""
    return f". The closest is kind={nearest.kind!r}:{list_problems(nearest.misfits)}"


def _claim(kind: str, prefix: str, tables: Iterable[Table], names: Collection[str]) -> Claim:
    nearest = min((misfits(table, names) for table in tables), key=len)
    return Claim(kind, prefix, tuple(nearest))


def prefixes(marker: str, names: Iterable[str]) -> list[str]:
    """The prefixes of the networks in a file, such as "" or "teacher."; `marker` is the regex of a
    name that every network of the kind has."""
    matches = (re.fullmatch(rf"(|.*?\.)(?:{marker})", name) for name in names)
    return sorted({match[1] for match in matches if match})


def choose_prefix(markers: Iterable[str], names: Collection[str], chosen: str, file: str) -> str:
    """The prefix of the network to read from a file; "" if there is none.

    Args:
      markers: the markers of the kinds of network, see `prefixes`.
      names: names of all tensors.
      chosen: the user's choice among several networks, such as "teacher."; "" without a choice.
      file: the file's name, for messages.

    Raises ValueError if there are several networks and none is chosen, or the chosen one is
    missing.
    """
    there = sorted({prefix for marker in markers for prefix in prefixes(marker, names)})
    shown = ", ".join(map(brief, there[:5])) or "none"
    if chosen and chosen not in there:
        raise ValueError(f"{file} holds no network below weights={chosen!r}; there are: {shown}")
    # If "" is among them, the others are parts of one outer network.
    if chosen or len(there) < 2 or "" in there:
        return chosen or min(there, default="")
    raise ValueError(
        f"{file} holds networks below {shown}: choose with weights={there[0]} "
        f"(--config.sources.weights={there[0]} of a run, --weights={there[0]} of a command)"
    )


def take_prefix(tensors: Tensors, prefix: str) -> tuple[dict[str, np.ndarray], Account]:
    """The tensors under a prefix, by names without it, and an account of the others."""
    own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    others = sorted(name for name in tensors if not name.startswith(prefix))
    notes = (f"the prefix {prefix!r} was removed from the names",) if prefix else ()
    left = tuple((name, "belongs to the rest of the model") for name in others)
    return own, Account((), dropped=left, notes=notes)


def _form(entry: Entry, tensors: Tensors) -> Entry:
    """The form of an entry that the tensors match; the entry itself if they match none, or both."""
    there = [form for form in entry.forms if any(name in tensors for name in form.names)]
    own = any(name in tensors for name in entry.names)
    # With both, the other form remains unused, which `_divide` reports.
    return there[0] if there and not own else entry


def _differing(parts: Tensors, expected: Mapping[str, tuple[int, ...]], path: str) -> list[str]:
    """One line for every tensor of a parameter that is missing or of the wrong shape."""
    missing = {name: shape for name, shape in expected.items() if name not in parts}
    return [f"{name} {shape} is missing, for {path}" for name, shape in missing.items()] + [
        f"{name} is {part.shape} and should be {expected[name]}"
        for name, part in parts.items()
        if part.shape != expected[name]
    ]


def _divide(
    rest: Tensors, left_out: Mapping[str, str], forms: Mapping[str, str]
) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """Splits unused tensors into those that are left out, with the reasons, and problems, one line
    for each of the others."""
    left, lines = [], []
    for name, array in sorted(rest.items()):
        reason = next((why for rx, why in left_out.items() if re.fullmatch(rx, name)), None)
        if reason is not None:
            left.append((name, reason))
        elif name in forms:
            lines.append(f"{name} {np.shape(array)} and {forms[name]} are the same; leave one out")
        else:
            lines.append(f"{name} {np.shape(array)} has no place")
    return tuple(left), lines


def _other_forms(entries: Iterable[Entry]) -> dict[str, str]:
    """Tensor names in entries' other forms -> the entry's first tensor name."""
    pairs = ((form, entry.names[0]) for entry in entries for form in entry.forms)
    return {name: first for form, first in pairs for name in form.names}


def _tensor_shapes(entry: Entry, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of an entry's tensors, given the parameter's shape."""
    # A broadcast array has any shape without taking memory.
    parts = entry.write(np.broadcast_to(np.float32(0), shape))
    return {name: part.shape for name, part in zip(entry.names, parts, strict=True)}


def _resolve(
    tensors: dict[str, np.ndarray], aliases: Mapping[str, str], problems: list[str]
) -> dict[str, str]:
    """Removes aliases from `tensors`, adds tensors that are only there under an alias, and returns
    the aliases."""
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
