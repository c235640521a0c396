"""A run's folder: the JSON files in it, the config that it belongs to, and the places it names."""

from common_jax.workdir.claim import claim, refuse_other_config
from common_jax.workdir.files import read_json, temporary_beside, write_json
from common_jax.workdir.places import check_input, check_output

__all__ = [
    "check_input",
    "check_output",
    "claim",
    "read_json",
    "refuse_other_config",
    "temporary_beside",
    "write_json",
]
