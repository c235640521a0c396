"""Accounts of what became of each tensor in a file, as values and as text."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np

# Limits on a message's list and on its lines, in characters.
ROOM, LINE = 1200, 160


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of each tensor in a file, by name."""

    taken: tuple[tuple[str, str, tuple[int, ...]], ...]  # tensor, our path, its shape in the file
    aliases: tuple[tuple[str, str], ...] = ()  # tensor, the equal one that was taken instead
    dropped: tuple[tuple[str, str], ...] = ()  # tensor, why it is not read
    # How the file was read: the chosen state dict, removed prefixes, default values.
    notes: tuple[str, ...] = ()
    # Config field, value: what neither the file nor the caller specifies.
    assumed: tuple[tuple[str, str], ...] = ()


def format_account(account: Account) -> str:
    """Formats an account as a table, with one line for all layers of a kind."""
    groups = {}
    for name, path, shape in account.taken:
        parts = fold(path).split("/")
        numbered = [i + 1 for i, part in enumerate(parts) if "*" in part]
        cut = numbered[-1] if numbered else max(1, len(parts) - 1)
        groups.setdefault("/".join(parts[:cut]), []).append((fold(name), int(np.prod(shape))))
    rows = [
        (group, len(sizes), sum(size for _, size in sizes), _common([name for name, _ in sizes]))
        for group, sizes in groups.items()
    ]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows), ""))
    wide = max(len(row[0]) for row in rows)
    lines = [f"{'taken':{wide}}  tensors        numbers  from"]
    lines += [f"{a:{wide}}  {n:7}  {size:13,}  {b}".rstrip() for a, n, size, b in rows]
    for title, pairs in (("the same as", account.aliases), ("dropped:", account.dropped)):
        folded = {}
        for name, why in pairs:
            folded.setdefault((fold(name), fold(why)), []).append(name)
        lines += [
            f"{name} {title} {why}" + (f" ({len(names)} tensors)" if len(names) > 1 else "")
            for (name, why), names in folded.items()
        ]
    lines += [f"note: {note}" for note in account.notes]
    if account.assumed:
        lines.append(f"assumed: {format_assumed(account)}")
    return "\n".join(lines)


def format_assumed(account: Account) -> str:
    """The assumed fields, such as "heads=16, eps=1e-05"."""
    return ", ".join(f"{field}={value}" for field, value in account.assumed)


def list_problems(problems: Sequence[str]) -> str:
    """Formats problems with tensors as lines of a message. If there are many, those that differ
    only in a layer's number are folded into one line; what exceeds ROOM is only counted."""
    lines = list(problems)
    if len(lines) > 12:
        folded = {}
        for line in lines:
            folded.setdefault(fold(line), []).append(line)
        lines = [
            f"{pattern} ({len(similar)} times)" if len(similar) > 1 else similar[0]
            for pattern, similar in folded.items()
        ]
    lines = [f"\n  {line if len(line) <= LINE else f'{line[: LINE - 3]}...'}" for line in lines]
    sizes = itertools.accumulate(map(len, lines))
    shown = lines[: max(1, sum(size <= ROOM for size in sizes))]
    if len(shown) < len(lines):
        more = len(lines) - len(shown)
        shown.append(f"\n  and {more} more kinds of problem, {len(problems)} in all")
    return "".join(shown)


def join(*accounts: Account) -> Account:
    """Joins the accounts of several files, or of several parts of one."""
    names = (field.name for field in dataclasses.fields(Account))
    return Account(*(sum((getattr(one, name) for one in accounts), ()) for name in names))


def fold(path: str) -> str:
    """A path or name with layer numbers replaced by "*"."""
    return re.sub(r"(?<=[._])\d+(?=[./_]|$)", "*", path)


def _common(paths: Sequence[str]) -> str:
    """The common prefix of folded names."""
    if len(set(paths)) == 1:
        return paths[0]
    columns = zip(*(path.split(".") for path in paths), strict=False)
    shared = [column[0] for column in itertools.takewhile(lambda c: len(set(c)) == 1, columns)]
    return ".".join(shared) or "..."
