"""The report on a folder of runs: their metrics, plots of them, and one HTML page."""

from common_jax.report.gather import (
    ACCURACY,
    FAMILIES,
    LOSS,
    OF_TRAINING,
    Family,
    Shares,
    panels,
)
from common_jax.report.live import refresh, reporting
from common_jax.report.page import Table, dispensable, write_report
from common_jax.report.pictures import is_picture

__all__ = [
    "ACCURACY",
    "FAMILIES",
    "LOSS",
    "OF_TRAINING",
    "Family",
    "Shares",
    "Table",
    "dispensable",
    "is_picture",
    "panels",
    "refresh",
    "reporting",
    "write_report",
]
