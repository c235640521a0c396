"""The config of a workdir: a run with a different config is refused, listing what differs."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from common_jax import config as configs
from common_jax.workdir import versions
from common_jax.workdir.files import list_folder, read_json, write_json
from common_jax.workdir.lock import require

FILE = "config.json"
SHOWN, WIDTH = 12, 120  # fields in a message, and characters of each


def claim(workdir: epath.PathLike, config: Any) -> None:
    """Writes `config` to a workdir, overwriting any that is there: call `refuse_other_config`
    first. If it is there already, nothing is written: a finished run may be on a read-only disk.
    Raises as `require`."""
    path, content = epath.Path(workdir) / FILE, plain(config)
    if path.exists() and read_json(path) == _as_read(content):
        return
    require(workdir)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


def refuse_other_config(workdir: epath.PathLike, config: Any, *, apart: str = "") -> None:
    """Raises ValueError, with the fields that differ, if `workdir` has a run with another config.

    A run without checkpoints and result may be replaced, which is logged. Paths of runs beside it,
    such as those of its pipeline, may differ in the folder that holds them all: it was moved.

    Args:
      workdir: the run's folder.
      config: the run's config, a frozen dataclass. Fields that the stored config lacks because an
        earlier version wrote it get the dataclass's defaults; stored fields that this version
        lacks are named in a warning. A plain mapping must have all fields.
      apart: regex of fields that may differ.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return
    stored = read_json(path)
    if dataclasses.is_dataclass(config):
        stored, removed = versions.fill(type(config), stored)
        versions.name_gone(removed, path)
    after = _lasting(plain(config), apart)
    lines = configs.difference(_moved(_lasting(stored, apart), after, workdir), after)
    if lines and not holds_results(workdir):
        logging.info(
            "%s was started with another config but has no checkpoint yet: this config replaces it",
            workdir,
        )
    elif lines:
        raise ValueError(
            f"{workdir} holds a run of another config:\n  "
            + "\n  ".join(shorten_lines(lines))
            + "\ngive another --workdir, or the flags that make these fields equal"
        )


OUTCOMES = ("result.json", "scores.json")
BELOW = 3  # levels of nested folders: a run of a sweep, a run of its pipeline, a repetition of that


def holds_results(workdir: epath.PathLike, *, below: int = BELOW) -> bool:
    """Returns True if a run in the workdir, or in folders below it, has a checkpoint, intact or
    damaged, or a result."""
    for entry in list_folder(workdir):
        if entry.name in OUTCOMES:
            return True
        if entry.name == "checkpoints":
            if any(".orbax-checkpoint-tmp" not in step.name for step in list_folder(entry)):
                return True
        elif below and entry.is_dir() and holds_results(entry, below=below - 1):
            return True
    return False


def contradictions(
    stored: Mapping[str, Any], config: Any, *, workdir: epath.PathLike | None = None
) -> list[str]:
    """Lists the fields that both configs have and that differ, one per line, except PASSING ones.
    If there are none, both may belong to one run, even if different versions wrote them, or if it
    was moved to `workdir`, see `refuse_other_config`."""
    before, after = _lasting(stored), _lasting(plain(config))
    shared = before.keys() & after.keys()
    before, after = ({key: one[key] for key in shared} for one in (before, after))
    return configs.difference(_moved(before, after, workdir), after)


def plain(config: Any) -> dict[str, Any]:
    """Converts a config, a frozen dataclass or a mapping, to the form of config.json."""
    if dataclasses.is_dataclass(config):
        config = configs.unfreeze(config).to_dict()
    return dict(config)


# Fields that change results only by rounding, or only what is logged, which checkpoints are kept
# and when a run gives up. A run may resume with other values. `remat` and `attention` are fields of
# networks in any section.
PASSING = re.compile(
    r"run\.(log_every|best|keep|profile|compilation_cache|checkpoint_minutes|on_failed_save|wandb)"
    r"|mesh\.(data|fsdp|expert)"
    r"|data\.(workers|bad_share)"
    r"|(.+\.)?(remat|attention)"
)


def _lasting(config: Mapping[str, Any], apart: str = "") -> dict[str, Any]:
    return {
        key: value
        for key, value in configs.flatten(_as_read(config))
        if not PASSING.fullmatch(key) and not re.fullmatch(apart, key)
    }


def _as_read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it is read from its file: tuples, even nested ones, are lists there."""
    return json.loads(json.dumps(config))


# Levels above a run of the folder that is moved with it: a pipeline holds `modules/module_0`.
ABOVE = 2


def _moved(
    before: Mapping[str, Any], after: Mapping[str, Any], workdir: epath.PathLike | None
) -> dict[str, Any]:
    """Returns `before` with those paths of `after` that differ only in the folder that they share
    with `workdir`."""
    if workdir is None:
        return dict(before)
    roots = [f"{parent}/" for parent in epath.Path(workdir).parents][:ABOVE]

    def same(old: Any, new: Any) -> bool:
        if isinstance(old, list) and isinstance(new, list):
            return len(old) == len(new) and all(map(same, old, new))
        if old == new or not (isinstance(old, str) and isinstance(new, str)):
            return old == new
        tails = (new.removeprefix(root) for root in roots if new.startswith(root))
        return any(old.endswith(f"/{tail}") for tail in tails)

    return {
        key: after[key] if key in after and same(old, after[key]) else old
        for key, old in before.items()
    }


def shorten_lines(lines: list[str]) -> list[str]:
    """The first lines of `common_jax.config.difference`, cut to WIDTH, for a message."""
    # Fields that both have come first: if a section is of another kind, all others are absent.
    ordered = sorted(lines, key=lambda line: "'(absent)'" in line)
    short = [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in ordered]
    more = len(short) - SHOWN
    return short if more <= 0 else [*short[:SHOWN], f"and {more} more"]
