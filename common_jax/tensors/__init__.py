"""Weights of others on disk: arrays by their names, in safetensors and PyTorch's files, without
PyTorch."""

from common_jax.tensors.account import Account, format_account, format_assumed, list_problems
from common_jax.tensors.files import (
    Weights,
    module_classes,
    read_plain,
    read_tensors,
    read_weights,
    weights_file,
    widen,
    write_tensors,
    write_torch,
)

__all__ = [
    "Account",
    "Weights",
    "format_account",
    "format_assumed",
    "list_problems",
    "module_classes",
    "read_plain",
    "read_tensors",
    "read_weights",
    "weights_file",
    "widen",
    "write_tensors",
    "write_torch",
]
