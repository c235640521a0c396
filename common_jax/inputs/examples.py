"""Single examples, their sources, and the bookkeeping of those that cannot be read."""

import json
import logging
import os
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath

Example = dict[str, np.ndarray | np.generic]
Batch = dict[str, np.ndarray]
REPAIR = "repair or remove them"  # what an error about bad examples advises


class BadExample(ValueError):
    """An example that cannot be read: `name` identifies it (such as a file), `reason` says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


Outcome = Example | BadExample  # the outcome of reading an example


@runtime_checkable
class Source(Protocol):
    """Random access to examples. `arrays` has all of them stacked, if they are in memory."""

    @property
    def arrays(self) -> dict[str, np.ndarray] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Returns an example; raises BadExample if it cannot be read."""
        ...


def name_of(source: Source, index: int) -> str:
    """Returns what messages call an example: its file, if the source knows it."""
    name = getattr(source, "name", None)
    return name(index) if callable(name) else f"example {index}"


class BadExamples:
    """The bad examples so far. Each is counted once and reported by name; too many raise an error.

    The limit is on the share of distinct bad examples among all that may be read (`size`), so
    neither one bad file early in a run nor the same file in every epoch stops it.

    Args:
      way_out: what the error advises, with the reason, if the share is the caller's own; "" if it
        is config.data.bad_share.
    """

    def __init__(
        self,
        size: int,
        bad_share: float,
        report_path: os.PathLike | str | None,
        way_out: str = "",
    ):
        self.size = size
        self.bad_share = bad_share
        self.report_path = report_path
        self.way_out = way_out
        self._by_index: dict[int, BadExample] = {}

    def add(self, index: int, bad: BadExample) -> None:
        """Counts and reports an example; raises ValueError, with names and counts, if there are now
        too many."""
        if index in self._by_index:
            return
        self._by_index[index] = bad
        logging.warning("bad example %d (%d so far): %s", index, len(self._by_index), bad)
        if self.report_path is not None:
            _append_line(self.report_path, {"name": bad.name, "reason": bad.reason, "index": index})
        if len(self._by_index) > self.bad_share * self.size:
            if self.way_out:
                raise self.error("", self.way_out)
            why = f", more than config.data.bad_share={self.bad_share:g} allows"
            raise self.error(why, f"{REPAIR}, or raise config.data.bad_share")

    def error(self, why: str, way_out: str) -> ValueError:
        """Returns the error, with the names and the number of the bad examples."""
        count = len(self._by_index)
        names = "; ".join(str(bad) for bad in list(self._by_index.values())[:10])
        more = f"; and {count - 10} more" if count > 10 else ""
        where = f" (all of them in {self.report_path})" if self.report_path is not None else ""
        return ValueError(
            f"{count} bad examples of {self.size}{why}: {names}{more}{where}; {way_out}"
        )


def _append_line(path: os.PathLike | str, record: dict) -> None:
    # Rewritten as a whole, since object stores cannot append; the file is short.
    path, line = epath.Path(path), json.dumps(record) + "\n"
    text = path.read_text() if path.exists() else ""
    if line not in text:  # a resumed run reports the same example again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + line)


def host_report_path(path: os.PathLike | str | None, shard: tuple[int, int]) -> epath.Path | None:
    """Returns a host's report file: `bad_examples.jsonl`, or `bad_examples.3.jsonl` for host 3."""
    if path is None:
        return None
    path = epath.Path(path)
    return path if shard[0] == 0 else path.with_name(f"{path.stem}.{shard[0]}{path.suffix}")
