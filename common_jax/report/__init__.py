"""The report on a folder of runs: their metrics, plots of them, and one HTML page."""

from common_jax.report.draw import COLOURS, DPI, INK, is_picture, overlay
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

__all__ = [
    "ACCURACY",
    "COLOURS",
    "DPI",
    "FAMILIES",
    "INK",
    "LOSS",
    "OF_TRAINING",
    "Family",
    "Shares",
    "Table",
    "dispensable",
    "is_picture",
    "overlay",
    "panels",
    "refresh",
    "reporting",
    "write_report",
]
