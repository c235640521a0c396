"""A run's folder: who writes there, its JSON files, and the config that it belongs to."""

from common_jax.workdir.claim import claim, holds_results, refuse_other_config
from common_jax.workdir.files import read_json, temporary_beside, write_bytes, write_json
from common_jax.workdir.lock import Locked, LockLost, hold, require

__all__ = [
    "LockLost",
    "Locked",
    "claim",
    "hold",
    "holds_results",
    "read_json",
    "refuse_other_config",
    "require",
    "temporary_beside",
    "write_bytes",
    "write_json",
]
