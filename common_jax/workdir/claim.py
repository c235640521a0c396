"""A workdir belongs to one config: others are refused, with the fields that differ."""

import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from common_jax import config as configs
from common_jax.workdir.files import read_json, write_json


def claim(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Keeps `config` in a workdir of several runs; raises as `refuse_other_config`."""
    refuse_other_config(workdir, config)
    if jax.process_index() == 0:
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", config)


def refuse_other_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Raises ValueError when `workdir` holds a run of another config, with the fields that
    differ."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    lines = configs.difference(_lasting(read_json(path)), _lasting(config))
    if lines:
        raise ValueError(
            f"{workdir} holds a run of another config:\n  "
            + "\n  ".join(lines)
            + "\ngive another --workdir, or the flags that make these fields equal"
        )


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
