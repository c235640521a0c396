"""Checkpoints: orbax, written during training, and read on any mesh, whole or in part.

A step's folder holds four items: `params`, all that a user loads; `trainer`, the rest that a run
needs to resume; `config`, the JSON that made it; `run`, the run that it belongs to. Finished
folders carry orbax's marker in every item; only those are read, and of a workdir only those of its
run.
"""

from common_jax.checkpoint.belonging import FOLDER, Stock, finished_steps, own_steps, take_stock
from common_jax.checkpoint.reading import (
    AVERAGE,
    absolute,
    check_source,
    find_step,
    load,
    load_config,
    load_shapes,
    read,
    refuse_pattern,
)
from common_jax.checkpoint.writing import Checkpoints, SaveError, write_params

__all__ = [
    "AVERAGE",
    "FOLDER",
    "Checkpoints",
    "SaveError",
    "Stock",
    "absolute",
    "check_source",
    "find_step",
    "finished_steps",
    "load",
    "load_config",
    "load_shapes",
    "own_steps",
    "read",
    "refuse_pattern",
    "take_stock",
    "write_params",
]
