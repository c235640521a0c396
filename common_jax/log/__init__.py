"""A run's log: what is written to files, what the terminal shows, and the clocks."""

from common_jax.log.bars import progress
from common_jax.log.clocks import Alarm, Clock, watch_compilation
from common_jax.log.console import Console, conclude, introduce
from common_jax.log.lines import Log, averages
from common_jax.log.past import Past, read_past, unscored

__all__ = [
    "Alarm",
    "Clock",
    "Console",
    "Log",
    "Past",
    "averages",
    "conclude",
    "introduce",
    "progress",
    "read_past",
    "unscored",
    "watch_compilation",
]
