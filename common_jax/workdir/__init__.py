"""A run's folder: its lock, JSON files, config and identity, and the paths that a config names."""

from common_jax.workdir.agreement import require_same_start
from common_jax.workdir.arrays import read_arrays, write_arrays
from common_jax.workdir.claim import (
    ABOVE,
    claim,
    contradictions,
    holds_results,
    plain,
    refuse_other_config,
)
from common_jax.workdir.files import (
    describe_error,
    in_bucket,
    list_folder,
    new_folder,
    read_json,
    remedy,
    replacing,
    write_bytes,
    write_json,
)
from common_jax.workdir.identity import Identity, keep_identity, read_identity
from common_jax.workdir.lock import Locked, LockLost, hold, require, require_everywhere
from common_jax.workdir.places import check_input, check_output, check_output_file
from common_jax.workdir.results import read_result, unfinished, write_result
from common_jax.workdir.versions import freeze_stored
