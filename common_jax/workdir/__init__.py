"""A run's folder: the JSON files in it, the config that it belongs to, and its identity."""

from common_jax.workdir.claim import claim, contradictions, plain, refuse_other_config
from common_jax.workdir.files import read_json, temporary_beside, write_json
from common_jax.workdir.identity import Identity, keep_identity, read_identity
from common_jax.workdir.results import read_result
from common_jax.workdir.versions import freeze_stored

__all__ = [
    "Identity",
    "claim",
    "contradictions",
    "freeze_stored",
    "keep_identity",
    "plain",
    "read_identity",
    "read_json",
    "read_result",
    "refuse_other_config",
    "temporary_beside",
    "write_json",
]
