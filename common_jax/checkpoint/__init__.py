"""Checkpoints: orbax, written while training goes on, and read on any mesh, whole or in part.

A step's folder holds three items: `params`, all that a user loads; `trainer`, what a run needs to
go on; `config`, the JSON that made it. Finished folders carry orbax's marker in every item; only
those are ever read.
"""

from common_jax.checkpoint.reading import (
    AVERAGE,
    FOLDER,
    absolute,
    check_source,
    find_step,
    finished_steps,
    load,
    load_config,
    load_shapes,
    read,
)
from common_jax.checkpoint.writing import Checkpoints, SaveError, write_params

__all__ = [
    "AVERAGE",
    "FOLDER",
    "Checkpoints",
    "SaveError",
    "absolute",
    "check_source",
    "find_step",
    "finished_steps",
    "load",
    "load_config",
    "load_shapes",
    "read",
    "write_params",
]
