"""A workdir belongs to one config: others are refused, with the fields that differ."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from common_jax import config as configs
from common_jax.workdir.files import read_json, write_json
from common_jax.workdir.lock import require


def claim(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Keeps `config` in a workdir of several runs; raises as `refuse_other_config` and
    `require`."""
    refuse_other_config(workdir, config)
    require(workdir)
    if jax.process_index() == 0:
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", config)


def refuse_other_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Raises ValueError when `workdir` holds a run of another config, with the fields that differ;
    one that came to no checkpoint and no result may be replaced, which the log says."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    lines = configs.difference(_lasting(read_json(path)), _lasting(config))
    if lines and not holds_results(workdir):
        logging.info(
            "%s was started with another config and came to no checkpoint: this config takes its "
            "place",
            workdir,
        )
    elif lines:
        raise ValueError(
            f"{workdir} holds a run of another config:\n  "
            + "\n  ".join(lines)
            + "\ngive another --workdir, or the flags that make these fields equal"
        )


OUTCOMES = ("result.json", "scores.json")
BELOW = 3  # folders in folders: a run of a sweep, a phase of its pipeline, an episode of that


def holds_results(workdir: epath.PathLike, *, below: int = BELOW) -> bool:
    """Whether a run has come to a checkpoint, whole or damaged, or to a result, in a workdir or in
    folders below it."""
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


# Fields that change no more of what is computed than its rounding: a run may go on with others.
# `remat` is a field of networks, wherever they stand.
PASSING = re.compile(
    r"run\.(profile|compilation_cache|checkpoint_minutes|on_failed_save)"
    r"|mesh\.(data|fsdp|expert)"
    r"|data\.workers"
    r"|(.+\.)?remat"
)


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = configs.flatten(config)
    return {key: value for key, value in flat if not PASSING.fullmatch(key)}
