"""Optimizers and learning-rate schedules, and the section of the config that chooses them."""

from common_jax.optim.config import OptimConfig, idle_optim, replaced_lengths, scale_lengths
from common_jax.optim.optimizers import (
    OPTIMIZERS,
    OptimizerKind,
    clip_by_norm,
    decay_mask,
    keep,
    make_optimizer,
)
from common_jax.optim.schedules import SCHEDULES, Schedule, ScheduleKind, make_schedule
