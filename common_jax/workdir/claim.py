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
from common_jax.workdir.files import read_json, write_json
from common_jax.workdir.lock import require

FILE = "config.json"
SHOWN, WIDTH = 12, 120  # fields in a message, and characters of each


def claim(workdir: epath.PathLike, config: Any) -> None:
    """Writes `config` to a workdir, overwriting any that is there: call `refuse_other_config`
    first. Raises as `require`."""
    require(workdir)
    if jax.process_index() == 0:
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / FILE, plain(config))


def refuse_other_config(workdir: epath.PathLike, config: Any, *, apart: str = "") -> None:
    """Raises ValueError, with the fields that differ, if `workdir` has a run with another config.

    A run without checkpoints and result may be replaced, which is logged.

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
    lines = configs.difference(_lasting(stored, apart), _lasting(plain(config), apart))
    if lines and not holds_results(workdir):
        logging.info(
            "%s was started with another config but has no checkpoint yet: this config replaces it",
            workdir,
        )
    elif lines:
        raise ValueError(
            f"{workdir} holds a run of another config:\n  "
            + "\n  ".join(_shorten(lines))
            + "\ngive another --workdir, or the flags that make these fields equal"
        )


OUTCOMES = ("result.json", "scores.json")
BELOW = 3  # levels of nested folders: a run of a sweep, a run of its pipeline, a repetition of that


def holds_results(workdir: epath.PathLike, *, below: int = BELOW) -> bool:
    """Returns True if a run in the workdir, or in folders below it, has a checkpoint, intact or
    damaged, or a result."""
    workdir = epath.Path(workdir)
    if any((workdir / name).exists() for name in OUTCOMES):
        return True
    for entry in workdir.iterdir() if workdir.is_dir() else ():
        if entry.name == "checkpoints":
            if any(".orbax-checkpoint-tmp" not in step.name for step in entry.iterdir()):
                return True
        elif below and entry.is_dir() and holds_results(entry, below=below - 1):
            return True
    return False


def contradictions(stored: Mapping[str, Any], config: Any) -> list[str]:
    """Lists the fields that both configs have and that differ, one per line, except PASSING ones.
    If there are none, both may belong to one run, even if different versions wrote them."""
    before, after = _lasting(stored), _lasting(plain(config))
    shared = before.keys() & after.keys()
    return configs.difference(*({key: one[key] for key in shared} for one in (before, after)))


def plain(config: Any) -> dict[str, Any]:
    """Converts a config, a frozen dataclass or a mapping, to the form of config.json."""
    if dataclasses.is_dataclass(config):
        config = configs.unfreeze(config).to_dict()
    return dict(config)


# Fields that change results only by rounding, or only which checkpoints are kept and when a run
# gives up. A run may resume with other values. `remat` and `attention` are fields of networks in
# any section.
PASSING = re.compile(
    r"run\.(best|keep|profile|compilation_cache|checkpoint_minutes|on_failed_save|wandb)"
    r"|mesh\.(data|fsdp|expert)"
    r"|data\.(workers|bad_share)"
    r"|(.+\.)?(remat|attention)"
)


def _lasting(config: Mapping[str, Any], apart: str = "") -> dict[str, Any]:
    as_read = json.loads(json.dumps(config))  # turns tuples, even nested ones, into lists
    return {
        key: value
        for key, value in configs.flatten(as_read)
        if not PASSING.fullmatch(key) and not re.fullmatch(apart, key)
    }


def _shorten(lines: list[str]) -> list[str]:
    # Fields that both have come first: if a section is of another kind, all others are absent.
    ordered = sorted(lines, key=lambda line: "'(absent)'" in line)
    short = [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in ordered]
    more = len(short) - SHOWN
    return short if more <= 0 else [*short[:SHOWN], f"and {more} more"]
