"""Published weights on disk, as numpy arrays by their names."""

from cliptrans_jax.tensors.files import read_tensors, widen, write_tensors

__all__ = ["read_tensors", "widen", "write_tensors"]
