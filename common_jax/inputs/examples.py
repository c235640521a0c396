"""Single examples, their source, and the count of those that cannot be read."""

import json
import logging
import os
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath

Example = dict[str, np.ndarray | np.generic]
Batch = dict[str, np.ndarray]


class BadExample(ValueError):
    """One example that cannot be read: `name` says which (a file), `reason` why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


Outcome = Example | BadExample  # of reading an example


@runtime_checkable
class Source(Protocol):
    """Random access to examples; `arrays` holds all of them, stacked, where they fit in memory."""

    @property
    def arrays(self) -> dict[str, np.ndarray] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """One example; raises BadExample where it cannot be read."""
        ...


class BadExamples:
    """The bad examples so far, each counted once and reported by name; too many stop the run.

    The allowed share is that of distinct bad examples in the whole source (`size`), so that neither
    one bad file early in a run nor the same file in every epoch stops it.
    """

    def __init__(self, size: int, bad_share: float, report_path: os.PathLike | str | None):
        self.size = size
        self.bad_share = bad_share
        self.report_path = report_path
        self.found: dict[int, BadExample] = {}

    def add(self, index: int, bad: BadExample) -> None:
        """Counts and reports one; above the share raises ValueError, with names and counts."""
        if index in self.found:
            return
        self.found[index] = bad
        logging.warning("bad example %d (%d so far): %s", index, len(self.found), bad)
        if self.report_path is not None:
            _append_line(self.report_path, {"name": bad.name, "reason": bad.reason, "index": index})
        if len(self.found) > self.bad_share * self.size:
            raise self.error(f"more than config.data.bad_share={self.bad_share:g} allows")

    def error(self, why: str) -> ValueError:
        """The error to raise, with names and count of the bad examples."""
        named = "; ".join(str(bad) for bad in list(self.found.values())[:10])
        more = f"; and {len(self.found) - 10} more" if len(self.found) > 10 else ""
        listed = f" (all of them in {self.report_path})" if self.report_path is not None else ""
        return ValueError(
            f"{len(self.found)} bad examples of {self.size}, {why}: {named}{more}{listed}; "
            "repair or remove them, or raise config.data.bad_share"
        )


def _append_line(path: os.PathLike | str, record: dict) -> None:
    # Rewritten, not appended to: object stores cannot append, and the file is short.
    path, line = epath.Path(path), json.dumps(record) + "\n"
    before = path.read_text() if path.exists() else ""
    if line not in before:  # a resumed run may find the same example again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(before + line)


def host_report_path(path: os.PathLike | str | None, shard: tuple[int, int]) -> epath.Path | None:
    """The report file of one host: `bad_examples.jsonl`, and `bad_examples.3.jsonl` for host 3."""
    if path is None:
        return None
    path = epath.Path(path)
    return path if shard[0] == 0 else path.with_name(f"{path.stem}.{shard[0]}{path.suffix}")
