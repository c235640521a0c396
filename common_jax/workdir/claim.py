"""The config that a workdir belongs to: others are refused, with the fields that differ."""

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
SHOWN, WIDTH = 12, 120  # fields that a message lists, and letters of each


def claim(workdir: epath.PathLike, config: Any) -> None:
    """Writes `config` to a workdir and replaces any that is there, so call `refuse_other_config`
    first. Raises as `require`."""
    require(workdir)
    if jax.process_index() == 0:
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / FILE, plain(config))


def refuse_other_config(workdir: epath.PathLike, config: Any, *, apart: str = "") -> None:
    """Raises ValueError when `workdir` holds a run of another config, with the fields that differ.
    A run without a checkpoint or result may be replaced, which the log says.

    Args:
      workdir: of the run.
      config: frozen dataclass of the run. Fields that the stored config lacks, since an earlier
        version wrote it, are taken as the dataclass's defaults; those that this version lacks are
        named in a warning. Of a plain mapping all fields must be there.
      apart: regex of fields that may differ.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return
    stored = read_json(path)
    if dataclasses.is_dataclass(config):
        stored, gone = versions.fill(type(config), stored)
        versions.name_gone(gone, path)
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
    """Whether a run in a workdir, or in folders below it, has a checkpoint, whole or damaged, or a
    result."""
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
    """The fields that differ between two configs, one line each, without passing ones and without
    those that one lacks: configs of one run, even of two versions, have none."""
    before, after = _lasting(stored), _lasting(plain(config))
    return configs.difference(
        {key: before[key] for key in before.keys() & after.keys()},
        {key: after[key] for key in before.keys() & after.keys()},
    )


def plain(config: Any) -> dict[str, Any]:
    """A config, a frozen dataclass or a mapping, as config.json holds it."""
    if dataclasses.is_dataclass(config):
        config = configs.unfreeze(config).to_dict()
    return dict(config)


# Fields that change only the rounding of a result: a run may resume with other values.
# `remat` is a field of networks, wherever they stand.
PASSING = re.compile(
    r"run\.(profile|compilation_cache|checkpoint_minutes|on_failed_save)"
    r"|mesh\.(data|fsdp|expert)"
    r"|data\.workers"
    r"|(.+\.)?remat"
)


def _lasting(config: Mapping[str, Any], apart: str = "") -> dict[str, Any]:
    as_read = json.loads(json.dumps(config))  # tuples within tuples are lists there
    flat = configs.flatten(as_read)
    lasting = {key: value for key, value in flat if not PASSING.fullmatch(key)}
    return {key: value for key, value in lasting.items() if not re.fullmatch(apart, key)}


def _shorten(lines: list[str]) -> list[str]:
    # First what both have: where a section is of another kind, all of its fields are absent.
    ordered = sorted(lines, key=lambda line: "'(absent)'" in line)
    cut = [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in ordered]
    more = len(cut) - SHOWN
    return cut if more <= 0 else [*cut[:SHOWN], f"and {more} more"]
