"""The cells of a sweep: read from --grid or from a config file's `sweep()`, and checked."""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from etils import epath

from common_jax import app
from common_jax.command_line import check_field, run_config_file, unread
from common_jax.commands.choice import choose
from common_jax.config import freeze
from common_jax.optim import replaced_lengths

NOWHERE = epath.Path("WORKDIR")  # never written to
BRACKETS = {"(": ")", "[": "]"}

Files = dict[str, tuple[str, ...]]  # folder of a run -> files that it has once it is finished
Programs = Mapping[str, "Program"]  # by the config field that identifies the program


@dataclasses.dataclass(frozen=True)
class Program:
    """The command that runs a config.

    Attributes:
      module: for python's -m.
      field: the field of its configs that names the kind of run.
      config: the dataclass of its configs.
      metric: the metric that a sweep compares by default.
      results: config -> the folder of the run whose metrics count (None if there is none), and the
        files of all runs.
      reads: sections and fields that each kind of run reads.
      idle: config -> why a field that is set changes nothing, by its path or its section's.
    """

    module: str
    field: str
    config: type
    metric: str
    results: Callable[[Any], tuple[str | None, Files]]
    reads: Mapping[str, Sequence[str]]
    idle: Callable[[Any], Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of the table: one setting of the swept fields, run once per seed.

    Attributes:
      name: name of its folders without the seed, such as "alpha=0.3,experts=4".
      values: text by key, as in flags and arguments.
      config: the config of its runs, as a plain dict.
      command: arguments for python, without seed and workdir.
      main: folder of the run whose metrics count, "" for the cell's own; None if there is none.
      files: folder -> files of each finished run.
    """

    name: str
    values: Mapping[str, str]
    config: Mapping[str, Any]
    command: tuple[str, ...]
    main: str | None
    files: Files


def parse_grid(text: str) -> list[dict[str, str]]:
    """Expands `KEY=VALUE,VALUE;KEY=VALUE` to all combinations, one dict per cell; commas in
    brackets and quotes belong to a value.

    Raises:
      ValueError: for malformed text, quoting it.
    """
    grid: dict[str, list[str]] = {}
    for part in filter(None, (part.strip() for part in _split(text, ";"))):
        key, _, values = (piece.strip() for piece in part.partition("="))
        found = [value.strip() for value in _split(values, ",")]
        if not key or not all(found):
            raise ValueError(f"--grid: {part!r} must be KEY=VALUE,VALUE with no value left empty")
        if key in grid:
            raise ValueError(f"--grid: {key!r} is given twice; list all of its values in one place")
        grid[key] = found
    if not grid:
        raise ValueError(f"--grid={text!r} sweeps nothing; write KEY=VALUE,VALUE;KEY=VALUE,VALUE")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def read_sweep(config: str) -> list[dict[str, str]]:
    """The dicts of a config file's `sweep()`, one per cell, all with the same keys.

    Raises:
      ValueError: if there is no such function, or it yields something else.
    """
    file = config.partition(":")[0]
    sweep = run_config_file(config).get("sweep")
    if sweep is None:
        raise ValueError(f"--grid is missing, and {file} has no sweep() to replace it; give --grid")
    found = list(sweep())
    if not found or not all(isinstance(one, Mapping) and one for one in found):
        raise ValueError(f"{file}: sweep() must yield dicts such as {{'optim.lr': 1e-3}}")
    for one in found:
        if set(one) != set(found[0]):
            raise ValueError(
                f"{file}: sweep() yields {dict(one)} after {dict(found[0])}; all of its dicts must "
                "have the same keys"
            )
    return [{key: _text(one[key]) for key in found[0]} for one in found]


def plan_cells(
    config: str,
    flags: Sequence[str],
    settings: Iterable[Mapping[str, str]],
    programs: Programs,
) -> list[Cell]:
    """The cells of these settings, each read, frozen and planned as its command would.

    Args:
      config: a config file with its arguments, FILE.py:key=value.
      flags: flags of all cells, --config.FIELD=VALUE.
      settings: text by key, all with the same keys: a field's path, or ":" and an argument's name.
      programs: the programs that may run the config.

    Raises:
      ValueError: if the command of any cell would refuse its config, with all reasons.
    """
    settings = list(settings)
    _check_keys(config, flags, list(settings[0]))
    short = short_keys(settings[0])
    cells: dict[str, Cell] = {}
    problems: dict[str, str] = {}
    for values in settings:
        try:
            cell = _plan_cell(config, flags, values, short, programs)
        except (ValueError, FileNotFoundError) as error:
            label = ", ".join(f"{key}={value}" for key, value in values.items())
            problems.setdefault(str(error), label)
            continue
        if cell.name in cells:
            problems.setdefault("two cells have the same settings; leave one out", cell.name)
        cells[cell.name] = cell
    if problems:
        lines = [f"{label}: {reason}" for reason, label in problems.items()]
        more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise ValueError("cells that cannot run:\n  " + "\n  ".join(lines[:10]) + more)
    return list(cells.values())


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Maps every key to the shortest end of its path that is unique: `optim.lr` to `lr`."""
    paths = {key: key.removeprefix(":").split(".") for key in keys}
    short = {}
    for key, path in paths.items():
        others = [other for other in paths if other != key]
        for count in range(1, len(path) + 1):
            end = path[-count:]
            if all(paths[other][-count:] != end for other in others) and end != ["seed"]:
                break
        short[key] = ".".join(end)
    return short


def _check_keys(config: str, flags: Sequence[str], keys: Sequence[str]) -> None:
    """Raises ValueError for a key that is also set elsewhere."""
    given = {flag.removeprefix("--config.").partition("=")[0]: flag for flag in flags}
    arguments = [pair.partition("=")[0] for pair in config.partition(":")[2].split(",")]
    given |= {f":{name}": f"--config={config}" for name in arguments if name}
    if "seed" in (*keys, *given):
        raise ValueError("--seeds N runs every cell with seeds from 0; leave config.seed out")
    if both := [key for key in keys if key in given]:
        raise ValueError(f"{both[0]!r} is swept, but {given[both[0]]} sets it too; leave one out")


def _plan_cell(
    config: str,
    flags: Sequence[str],
    values: Mapping[str, str],
    short: Mapping[str, str],
    programs: Programs,
) -> Cell:
    arguments = {key[1:]: value for key, value in values.items() if key.startswith(":")}
    file, _, given = config.partition(":")
    pairs = [*filter(None, given.split(",")), *(f"{k}={v}" for k, v in arguments.items())]
    chosen = f"{file}:{','.join(pairs)}" if pairs else file
    fields = {key: value for key, value in values.items() if not key.startswith(":")}
    found = _read_fields(chosen, flags, fields)
    # The value in the config, not the given text, so that 0.3 and 0.30 are the same cell.
    fields = {key: _text(_look_up(found, key)) for key in fields}
    program = choose(found, programs)
    frozen = freeze(program.config, found)
    main, files = program.results(frozen)
    _check_read(program, found, fields)
    # An argument of the config file may have the name of a field, such as `module`.
    _check_effect(program.idle(frozen) | replaced_lengths(found, fields), [*fields, *arguments])
    swept = {key: fields.get(key, values[key]) for key in values}
    own = [f"--config.{key}={value}" for key, value in fields.items()]
    return Cell(
        name=_cell_name({short[key]: value for key, value in swept.items()}),
        values=swept,
        config=found.to_dict(),
        command=("-m", program.module, f"--config={chosen}", *flags, *own),
        main=main,
        files=files,
    )


def _check_read(program: Program, config: ml_collections.ConfigDict, fields: Iterable[str]) -> None:
    """Raises ValueError if a swept field is not read by the cell's kind of run."""
    kind = config[program.field]
    reads = program.reads[kind]
    if lost := unread(fields, reads):
        raise ValueError(
            f"{program.field}={kind!r} does not read config.{lost[0]}, so all cells would have the "
            f"same numbers; it reads {sorted(reads)}"
        )


def _check_effect(idle: Mapping[str, str], fields: Iterable[str]) -> None:
    """Raises ValueError if a swept field is among those that change nothing."""
    for path, why in idle.items():
        for key in fields:
            if f"{key}.".startswith(f"{path}."):
                raise ValueError(
                    f"config.{key} changes nothing: {why}; leave out these cells, whose numbers "
                    "would be those of others"
                )


def _read_fields(
    config: str, flags: Sequence[str], fields: Mapping[str, str]
) -> ml_collections.ConfigDict:
    try:
        return read_config(config, [*flags, *(f"--config.{k}={v}" for k, v in fields.items())])
    except ValueError as error:
        plain = read_config(config, flags)  # raises if the swept fields are not at fault
        if unknown := [key for key in fields if key.partition(".")[0] not in plain]:
            hint = f"an argument of the config file begins with a colon, ':{unknown[0]}=VALUE'"
            raise ValueError(f"{error}; {hint}") from None
        usual = ", ".join(f"config.{key}={_look_up(plain, key)!r}" for key in fields)
        raise ValueError(f"{error}; unswept, {usual}: write values of that type") from None


def read_config(config: str, flags: Sequence[str]) -> ml_collections.ConfigDict:
    """The config that a command with these flags would use.

    Raises:
      ValueError, FileNotFoundError: as the command itself.
    """
    return app.read_config(["sweep", f"--config={config}", f"--workdir={NOWHERE}", *flags])


def _look_up(config: ml_collections.ConfigDict, path: str) -> Any:
    check_field(config, path)
    value = functools.reduce(lambda section, key: section[key], path.split("."), config)
    if isinstance(value, ml_collections.ConfigDict):
        raise ValueError(f"config.{path} is a section; sweep one of its fields {sorted(value)}")
    return value


def _text(value: Any) -> str:
    """A value as text for a flag; tuples without spaces."""
    if isinstance(value, tuple | list):
        items = ",".join(repr(item) for item in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    return str(value)


def _cell_name(values: Mapping[str, str]) -> str:
    """The name of a cell's folders, independent of the order of the keys."""
    name = ",".join(f"{key}={_in_a_name(values[key])}" for key in sorted(values))
    return name if len(name) <= 150 else f"{name[:140]}~{_digest(name)}"


def _in_a_name(text: str) -> str:
    """A value in characters that are safe in a shell: (1,2) becomes 1-2; any other change adds a
    digest."""
    item = r"[\w.+-]+"
    if re.fullmatch(rf"\({item}(,{item})*,?\)", text):
        return text.strip("(),").replace(",", "-")
    plain = re.sub(r"[^\w.+-]+", "-", text).strip("-")
    return plain if plain == text and len(text) <= 40 else f"{plain[-40:]}~{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()[:6]


def _split(text: str, separator: str) -> list[str]:
    """Splits `text` at separators outside brackets and quotes."""
    parts, closing, quote = [""], [], ""
    for letter in text:
        if letter == separator and not closing and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in BRACKETS:
            closing.append(BRACKETS[letter])
        elif letter in BRACKETS.values() and (not closing or closing.pop() != letter):
            raise ValueError(f"--grid: {text!r} closes a bracket {letter!r} that is not open")
        parts[-1] += letter
    if closing or quote:
        raise ValueError(f"--grid: {text!r} lacks a closing {quote or closing[-1]!r}")
    return parts
