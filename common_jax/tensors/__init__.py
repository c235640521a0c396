"""Weights of others on disk: arrays by their names, in safetensors and PyTorch's files, without
PyTorch."""

from common_jax.tensors.account import Account, format_account
from common_jax.tensors.files import read_plain, read_tensors, widen, write_tensors, write_torch

__all__ = [
    "Account",
    "format_account",
    "read_plain",
    "read_tensors",
    "widen",
    "write_tensors",
    "write_torch",
]
