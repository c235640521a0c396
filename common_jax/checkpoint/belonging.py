"""Checks that checkpoints belong to the run whose folder they are in, by their content, their
folder's name and the files beside them."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from common_jax import hosts
from common_jax.checkpoint.contents import FAILURES, JSON, MARK, Mark, read_mark, read_stored_step
from common_jax.workdir import Identity, contradictions, in_bucket, read_identity, read_json

FOLDER = "checkpoints"
ITEMS = ("params", "trainer", "config")
MARKER = "commit_success.txt"
NUMBER = re.compile(r"0|[1-9][0-9]*")


@dataclasses.dataclass(frozen=True)
class Stock:
    """The finished checkpoints in a workdir.

    Attributes:
      steps: the steps of the workdir's own run, ascending.
      foreign: why a checkpoint does not belong to the run, by its step.
      unmarked: those of `steps` that an earlier version wrote without a run id.
      id: the run's id, from run.json or else from its checkpoints; None if neither has one.
    """

    steps: tuple[int, ...] = ()
    foreign: Mapping[int, str] = dataclasses.field(default_factory=dict)
    unmarked: tuple[int, ...] = ()
    id: str | None = None


def step_of(folder: epath.Path) -> int | None:
    """The step that a checkpoint's folder is named after; None for other names, such as "007"."""
    return int(folder.name) if NUMBER.fullmatch(folder.name) else None


def finished_steps(folder: epath.PathLike) -> list[int]:
    """Returns the steps below `folder` with orbax's marker in every item, ascending.

    Lists the disk, and does not check which run they belong to.
    """
    folder = epath.Path(folder)
    if not folder.exists():
        return []
    return sorted(
        step
        for path in folder.iterdir()
        if (step := step_of(path)) is not None
        and all((path / item / MARKER).exists() for item in ("", *ITEMS))
    )


def unfinished_steps(folder: epath.PathLike) -> list[int]:
    """Returns the steps below `folder` that hold something but lack one of orbax's markers.

    In a bucket a killed save leaves one; on a disk only a partial copy or deletion does, since
    orbax renames a step to its number when it is finished.
    """
    folder, finished = epath.Path(folder), finished_steps(folder)
    return sorted(
        step
        for path in (folder.iterdir() if folder.exists() else ())
        if (step := step_of(path)) is not None
        and step not in finished
        and path.is_dir()
        and any(path.iterdir())
    )


def own_steps(folder: epath.PathLike) -> list[int]:
    """Returns the finished steps of the run that this `checkpoints` folder belongs to, ascending.

    Logs a warning for each of the others.

    Raises:
      ValueError: if there are checkpoints, but all contradict the files beside them.
    """
    folder = epath.Path(folder)
    workdir = folder.parent if folder.name == FOLDER else None
    steps, config, total = finished_steps(folder), None, None
    if workdir is not None:
        with contextlib.suppress(ValueError, OSError):  # each step also has its own config
            config = read_json(workdir / "config.json")
        with contextlib.suppress(ValueError, OSError):
            total = read_json(workdir / "result.json").get("steps")
        # A run always saves its last step, so without it the result belongs to another run.
        total = total if total in steps else None
    stock = _take_stock(folder, workdir, steps, config=config, total=total)
    for step, why in stock.foreign.items():
        logging.warning("checkpoint %s is left out: %s", folder / str(step), why)
    if stock.foreign and not stock.steps:
        raise ValueError(
            f"no checkpoint in {folder} belongs to its run: {_reasons(stock)}. Give the folder of "
            "a step to load it anyway"
        )
    return list(stock.steps)


def take_stock(workdir: epath.PathLike, *, config: Any, total: int) -> Stock:
    """Returns the checkpoints that exist when a run starts.

    All processes must call this at the same point; nothing is changed before all have looked.

    Args:
      workdir: the run's folder.
      config: the run's config, a frozen dataclass or a mapping.
      total: total number of steps of the run.

    Raises:
      ValueError: if there are checkpoints, but none is complete or none belongs to the run.
    """
    workdir = epath.Path(workdir)
    folder, stock, failure = workdir / FOLDER, Stock(), None
    try:
        steps = finished_steps(folder)
        if not steps and not in_bucket(folder) and (partial := unfinished_steps(folder)):
            raise ValueError(
                f"none of the checkpoints {partial} in {folder} is complete: each needs "
                f"{MARKER} in its folder and in each of {', '.join(ITEMS)}. Copy them again, or "
                "move the folder away to start from scratch"
            )
        stock = _take_stock(folder, workdir, steps, config=config, total=total)
        if stock.foreign and not stock.steps:
            failure = ValueError(
                f"no checkpoint in {folder} belongs to this run: {_reasons(stock)}. Give another "
                "--workdir, or move the folder away to start from scratch"
            )
    except (ValueError, OSError) as error:
        failure = error
    elsewhere = ValueError(f"{folder} does not belong to this run; another process says why")
    hosts.raise_everywhere(failure, elsewhere)
    return stock


@dataclasses.dataclass(frozen=True)
class _Content:
    """What a step's folder says about itself. Missing or unreadable parts are None;
    `restore_latest` reports them."""

    number: int  # the folder's name
    marked: bool  # whether it has a mark, readable or not
    mark: Mark | None
    stored: int | None  # the step counter of its state
    config: Mapping[str, Any] | None

    @classmethod
    def of(cls, step: epath.Path) -> "_Content":
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
    reasons = {
        content.number: _contradiction(content, workdir, config=config, total=total)
        for content in contents
    }
    identity = None if workdir is None else read_identity(workdir)
    if identity is None and workdir is not None:
        # run.json is lost, or an earlier version wrote none: take the run's id from the newest
        # checkpoint without a contradiction.
        ids = [c.mark.id for c in contents if c.mark and not reasons[c.number]]
        unmarked = tuple(c.number for c in contents if not c.marked)
        identity = Identity(ids[-1], unmarked) if ids else None
    if identity is not None:
        for content in contents:
            reasons[content.number] = reasons[content.number] or _other_run(content, identity)
    own = [content for content in contents if not reasons[content.number]]
    return Stock(
        steps=tuple(content.number for content in own),
        foreign={step: why for step, why in reasons.items() if why},
        unmarked=tuple(content.number for content in own if not content.marked),
        id=None if identity is None else identity.id,
    )


def _contradiction(
    content: _Content, workdir: epath.Path | None, *, config: Any, total: int | None
) -> str:
    """Returns what contradicts a step's name or its place in this run; "" if nothing does."""
    number, mark = content.number, content.mark
    if total is not None and number > total:
        return f"the run ends at step {total}"
    if mark is not None and mark.step != number:
        return f"it holds step {mark.step}, so the folder was copied or renamed"
    if content.stored not in (None, number):
        return f"it holds the state of step {content.stored}, so it was copied or renamed"
    if config is None or content.config is None:
        return ""
    if lines := contradictions(content.config, config, workdir=workdir):
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        shown = "; ".join(line[:120] for line in lines[:3])
        return f"it belongs to a run with another config ({shown}{more}, its value first)"
    return ""


def _other_run(content: _Content, identity: Identity) -> str:
    if content.mark is not None and content.mark.id != identity.id:
        return f"it belongs to run {content.mark.id[:40]!r}, and this is run {identity.id[:40]!r}"
    if not content.marked and content.number not in identity.unmarked:
        return f"it does not say which run it belongs to, and this is run {identity.id[:40]!r}"
    return ""


def _reasons(stock: Stock) -> str:
    lines = [f"step {step}: {why}" for step, why in stock.foreign.items()]
    more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
    return "; ".join(lines[-4:]) + more
