"""Published weights on disk: arrays by their names, and the networks whose names these are."""

from cliptrans_jax.tensors.files import read_tensors, widen, write_tensors

__all__ = ["read_tensors", "widen", "write_tensors"]
