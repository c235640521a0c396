"""Readers of untrusted bytes: declared sizes are checked against the file before anything is
allocated, and every problem is a ValueError that names the file."""

from common_jax.untrusted.json_text import as_id, as_text, parse_json
from common_jax.untrusted.npz import MOST_BYTES, full_size, read_npz
from common_jax.untrusted.refusal import RefusedError, brief, plain, refuse_pointer
from common_jax.untrusted.zips import DAMAGED, Archive, open_archive
