"""External weights: safetensors and PyTorch files, read without PyTorch; strict checks of names and
shapes; warm starts from other runs."""

from common_jax.weights.account import Account, format_account, format_assumed, list_problems
from common_jax.weights.files import (
    Weights,
    module_classes,
    read_plain,
    read_tensors,
    read_weights,
    weights_file,
    write_tensors,
    write_torch,
)
from common_jax.weights.warm_start import (
    Adapt,
    Allowance,
    Origin,
    Planned,
    WarmStart,
    size_of,
    take,
    warn_of_no_match,
)
