"""Converting files of the original, timm and DeiT to parameters that a phase starts from, and
back."""

from common_jax.weights.table import Pretrained
from m2mkd_jax.pretrained.kinds import KINDS
from m2mkd_jax.pretrained.reading import Source, find_source, load, read_files
from m2mkd_jax.pretrained.sizes import Inferred, infer_config
from m2mkd_jax.pretrained.writing import as_checkpoint, kind_of_run, load_run, to_tensors

__all__ = [
    "KINDS",
    "Inferred",
    "Pretrained",
    "Source",
    "as_checkpoint",
    "find_source",
    "infer_config",
    "kind_of_run",
    "load",
    "load_run",
    "read_files",
    "to_tensors",
]
