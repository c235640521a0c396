"""A run's folder: the JSON files in it, and the config that it belongs to."""

from common_jax.workdir.claim import claim, refuse_other_config
from common_jax.workdir.files import read_json, temporary_beside, write_json

__all__ = ["claim", "read_json", "refuse_other_config", "temporary_beside", "write_json"]
