"""Optimizers and learning-rate schedules, and the section of the config that chooses them."""

from common_jax.optim.config import REPLACED_BY, OptimConfig, idle_optim, scale_lengths
from common_jax.optim.optimizers import (
    OPTIMIZERS,
    OptimizerKind,
    clip_by_norm,
    decay_mask,
    keep,
    make_optimizer,
)
from common_jax.optim.schedules import SCHEDULES, Schedule, ScheduleKind, make_schedule
