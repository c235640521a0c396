"""The config of a workdir: a run of another config is refused, with the fields that differ."""

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
    """Writes `config` to a workdir, over any that is there: call `refuse_other_config` first.
    Raises as `require`."""
    require(workdir)
    if jax.process_index() == 0:
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / FILE, plain(config))


def refuse_other_config(workdir: epath.PathLike, config: Any, *, apart: str = "") -> None:
    """Raises ValueError when `workdir` has a run of another config, with the fields that differ.

    A run without checkpoint and result may be replaced, and the log says so.

    Args:
      workdir: of the run.
      config: frozen dataclass of the run. Fields that the stored config lacks, since an earlier
        version wrote it, have the dataclass's defaults; a warning names those that this version
        lacks. A plain mapping must have all fields.
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
            "%s was started with another config and came to no checkpoint: this config takes its "
            "place",
            workdir,
        )
    elif lines:
        raise ValueError(
            f"{workdir} holds a run of another config:\n  "
            + "\n  ".join(_shorten(lines))
            + "\ngive another --workdir, or the flags that make these fields equal"
        )


OUTCOMES = ("result.json", "scores.json")
BELOW = 3  # folders in folders: a run of a sweep, a part of its pipeline, a repetition of that


def holds_results(workdir: epath.PathLike, *, below: int = BELOW) -> bool:
    """Returns True where a run has a checkpoint, whole or damaged, or a result, in the workdir or
    in folders below it."""
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
    """Lists the fields that both configs have and that differ, a line each, without PASSING ones.
    Without any, they may belong to one run, even if different versions wrote them."""
    before, after = _lasting(stored), _lasting(plain(config))
    shared = before.keys() & after.keys()
    return configs.difference(*({key: one[key] for key in shared} for one in (before, after)))


def plain(config: Any) -> dict[str, Any]:
    """Returns a config, a frozen dataclass or a mapping, in the form of config.json."""
    if dataclasses.is_dataclass(config):
        config = configs.unfreeze(config).to_dict()
    return dict(config)


# Fields that change nothing but the rounding of the results, and which checkpoints are kept: a run
# may resume with other values. `remat` and `attention` are fields of networks in any section.
PASSING = re.compile(
    r"run\.(best|profile|compilation_cache|checkpoint_minutes|on_failed_save|wandb)"
    r"|mesh\.(data|fsdp|expert)"
    r"|data\.workers"
    r"|(.+\.)?(remat|attention)"
)


def _lasting(config: Mapping[str, Any], apart: str = "") -> dict[str, Any]:
    as_read = json.loads(json.dumps(config))  # turns tuples within tuples into lists
    return {
        key: value
        for key, value in configs.flatten(as_read)
        if not PASSING.fullmatch(key) and not re.fullmatch(apart, key)
    }


def _shorten(lines: list[str]) -> list[str]:
    # Fields that both have come first: where a section is of another kind, all others are absent.
    ordered = sorted(lines, key=lambda line: "'(absent)'" in line)
    short = [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in ordered]
    more = len(short) - SHOWN
    return short if more <= 0 else [*short[:SHOWN], f"and {more} more"]
