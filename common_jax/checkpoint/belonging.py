"""Checkpoints that belong to the run in whose folder they are, and those that do not.

A folder's name is compared with its content, and its content with the run's other files.
"""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from common_jax import hosts
from common_jax.checkpoint.contents import FAILURES, JSON, MARK, Mark, read_mark, read_stored_step
from common_jax.workdir import Identity, contradictions, read_identity, read_json

FOLDER = "checkpoints"
ITEMS = ("params", "trainer", "config")
MARKER = "commit_success.txt"
NUMBER = re.compile(r"0|[1-9][0-9]*")


@dataclasses.dataclass(frozen=True)
class Stock:
    """The finished checkpoints in a workdir.

    Attributes:
      steps: of its run, ascending.
      foreign: number of a folder -> why its checkpoint is not the run's.
      unmarked: those of `steps` that an earlier version wrote, without an id.
      id: of the run, from run.json or else its checkpoints; None where neither has one.
    """

    steps: tuple[int, ...] = ()
    foreign: Mapping[int, str] = dataclasses.field(default_factory=dict)
    unmarked: tuple[int, ...] = ()
    id: str | None = None


def finished_steps(folder: epath.PathLike) -> list[int]:
    """The steps below `folder` that carry orbax's marker, as does their every item, ascending; read
    from disk, and of whatever run."""
    folder = epath.Path(folder)
    if not folder.exists():
        return []
    steps = (path for path in folder.iterdir() if NUMBER.fullmatch(path.name))
    return sorted(
        int(path.name)
        for path in steps
        if all((path / item / MARKER).exists() for item in ("", *ITEMS))
    )


def own_steps(folder: epath.PathLike) -> list[int]:
    """The finished steps of the run whose `checkpoints` this folder is, ascending; warnings name
    the others.

    Raises:
      ValueError: when there are checkpoints, and all contradict the files beside them.
    """
    folder = epath.Path(folder)
    workdir = folder.parent if folder.name == FOLDER else None
    steps, config, total = finished_steps(folder), None, None
    if workdir is not None:
        with contextlib.suppress(ValueError, OSError):  # a step's own folder has all that counts
            config = read_json(workdir / "config.json")
        with contextlib.suppress(ValueError, OSError):
            total = read_json(workdir / "result.json").get("steps")
        # The last step of a run is always saved: without it the result is not this run's.
        total = total if total in steps else None
    stock = _take_stock(folder, workdir, steps, config=config, total=total)
    for step, why in stock.foreign.items():
        logging.warning("checkpoint %s is left out: %s", folder / str(step), why)
    if stock.foreign and not stock.steps:
        raise ValueError(
            f"no checkpoint in {folder} is its run's: {_reasons(stock)}. Give the folder of a step "
            "to load it all the same"
        )
    return list(stock.steps)


def take_stock(workdir: epath.PathLike, *, config: Any, total: int) -> Stock:
    """The checkpoints that a run finds when it starts. All processes must call this at the same
    place; nothing is changed before all have looked.

    Args:
      workdir: of the run.
      config: its config, a frozen dataclass or a mapping.
      total: its steps.

    Raises:
      ValueError: when there are checkpoints, and none is the run's.
    """
    workdir = epath.Path(workdir)
    folder, stock, failure = workdir / FOLDER, Stock(), None
    try:
        steps = finished_steps(folder)
        stock = _take_stock(folder, workdir, steps, config=config, total=total)
        if stock.foreign and not stock.steps:
            failure = ValueError(
                f"no checkpoint in {folder} is this run's: {_reasons(stock)}. Give another "
                "--workdir, or move the folder away to start from scratch"
            )
    except (ValueError, OSError) as error:
        failure = error
    if hosts.agree(failure is not None).any():
        raise failure or ValueError(f"{folder} is not this run's; another process says why")
    return stock


@dataclasses.dataclass(frozen=True)
class _Content:
    """The content of a step's folder; None for a part that is missing or cannot be read, which is
    reported later, when all of it is read.

    Attributes:
      number: the folder's name.
      marked: whether it has a mark, readable or not.
      mark: the run that it belongs to.
      stored: updates in its state.
      config: that made it.
    """

    number: int
    marked: bool
    mark: Mark | None
    stored: int | None
    config: Mapping[str, Any] | None

    @classmethod
    def of(cls, step: epath.Path) -> "_Content":
        """Reads it."""
        mark, stored, config = None, None, None
        with contextlib.suppress(*FAILURES):
            mark = read_mark(step)
        with contextlib.suppress(*FAILURES):
            stored = read_stored_step(step)
        with contextlib.suppress(*FAILURES):
            config = read_json(step / "config" / JSON)
        return cls(int(step.name), (step / MARK).exists(), mark, stored, config)


def _take_stock(
    folder: epath.Path,
    workdir: epath.Path | None,
    steps: Sequence[int],
    *,
    config: Any,
    total: int | None,
) -> Stock:
    contents = [_Content.of(folder / str(step)) for step in steps]
    reasons = {one.number: _contradiction(one, config=config, total=total) for one in contents}
    identity = None if workdir is None else read_identity(workdir)
    if identity is None and workdir is not None:
        # run.json is lost, or an earlier version wrote none: the newest checkpoint that nothing
        # contradicts says which run it is.
        found = [one.mark.id for one in contents if one.mark and not reasons[one.number]]
        unmarked = tuple(one.number for one in contents if not one.marked)
        identity = Identity(found[-1], unmarked) if found else None
    if identity is not None:
        for one in contents:
            reasons[one.number] = reasons[one.number] or _other_run(one, identity)
    own = [one for one in contents if not reasons[one.number]]
    return Stock(
        steps=tuple(one.number for one in own),
        foreign={step: why for step, why in reasons.items() if why},
        unmarked=tuple(one.number for one in own if not one.marked),
        id=None if identity is None else identity.id,
    )


def _contradiction(content: _Content, *, config: Any, total: int | None) -> str:
    """The reason why a step's folder is not what its name and place say; "" where there is none."""
    number, mark = content.number, content.mark
    if total is not None and number > total:
        return f"the run ends at step {total}"
    if mark is not None and mark.step != number:
        return f"it holds step {mark.step}, so the folder was copied or renamed"
    if content.stored not in (None, number):
        return f"it holds the state of step {content.stored}, so it was copied or renamed"
    if config is None or content.config is None:
        return ""
    if lines := contradictions(content.config, config):
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        shown = "; ".join(line[:120] for line in lines[:3])
        return f"it is of a run of another config ({shown}{more}, its value first)"
    return ""


def _other_run(content: _Content, identity: Identity) -> str:
    if content.mark is not None and content.mark.id != identity.id:
        return f"it is of run {content.mark.id[:40]!r}, and this is run {identity.id[:40]!r}"
    if not content.marked and content.number not in identity.unmarked:
        return f"it does not say of which run it is, and this is run {identity.id[:40]!r}"
    return ""


def _reasons(stock: Stock) -> str:
    lines = [f"of {step}, {why}" for step, why in stock.foreign.items()]
    more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
    return "; ".join(lines[-4:]) + more
