"""The file formats that may come from untrusted sources, by their names in the table of `make
fuzz`."""

from collections.abc import Callable

from fuzz_format import Format
from fuzz_pictures import picture_zips, pictures
from fuzz_runs import config_files, feature_caches, metrics_files, prior_caches
from fuzz_torch import torch_archives
from fuzz_weights import safetensors_files, shard_indices

FORMATS: dict[str, Callable[[], Format]] = {
    "PyTorch archive": torch_archives,
    "safetensors": safetensors_files,
    "shard index": shard_indices,
    "features npz": feature_caches,
    "prior npz": prior_caches,
    "image": pictures,
    "image zip": picture_zips,
    "metrics.jsonl": metrics_files,
    "config.json": config_files,
}
