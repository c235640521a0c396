"""Readers of bytes that may be anything: declared sizes are compared with the size of the file
before anything is allocated, and every failure is a ValueError that names the file."""

from common_jax.untrusted.json_text import as_text, parse_json
from common_jax.untrusted.npz import read_npz
from common_jax.untrusted.refusal import RefusedError, brief, plain
from common_jax.untrusted.shapes import MOST_AXES, MOST_BYTES, are_counts, full_size
from common_jax.untrusted.zips import DAMAGED, Archive, open_archive

__all__ = [
    "DAMAGED",
    "MOST_AXES",
    "MOST_BYTES",
    "Archive",
    "RefusedError",
    "are_counts",
    "as_text",
    "brief",
    "full_size",
    "open_archive",
    "parse_json",
    "plain",
    "read_npz",
]
