"""Checkpoints with orbax: written during training, and read on any mesh, in full or in part.

A step's folder has four items: `params`, all that a user loads; `trainer`, the state that a run
needs to resume; `config`, the run's config; `run`, the run's id. Finished folders have orbax's
marker in every item. Only finished ones are ever read, and in a workdir only those of its own run.
"""

from common_jax.checkpoint.belonging import FOLDER, Stock, finished_steps, own_steps, take_stock
from common_jax.checkpoint.reading import (
    AVERAGE,
    absolute,
    check_source,
    common_step,
    find_moved,
    find_step,
    has_average,
    load,
    load_config,
    load_shapes,
    naming_field,
    read_params,
    refuse_pattern,
    warn_if_unfinished,
)
from common_jax.checkpoint.writing import Checkpoints, SaveError, write_params
