"""Facts about a ViT that folders of timm and Hugging Face state beside its weights."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common_jax.untrusted import brief
from common_jax.weights import weights_file
from common_jax.weights.files import FOLDER_FILES
from common_jax.workdir import read_json
from m2mkd_jax.config import Config
from m2mkd_jax.phases.weights import same_numbers

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# Where each of our fields stands in timm's pretrained_cfg, and in Hugging Face's preprocessor.
TIMM = {"mean": "mean", "std": "std"}
HUGGING_FACE = {"mean": "image_mean", "std": "image_std"}
# Arguments of timm's models that tensors show, or that change nothing in evaluation. Any other may
# change what is computed without a trace in the tensors.
HARMLESS = (
    *("img_size", "num_classes", "in_chans", "patch_size", "embed_dim", "depth", "mlp_ratio"),
    *("qkv_bias", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"),
    *("pos_drop_rate", "patch_drop_rate", "weight_init", "dynamic_img_size", "global_pool"),
    "num_heads",
)
POOLS = (None, "", "token")


@dataclasses.dataclass(frozen=True)
class Beside:
    """Facts that a folder states about its weights.

    Attributes:
      file: that states them; "" where none does.
      images: "mean" and "std" of config.data, by these names.
      heads: attention heads, or None.
    """

    file: str = ""
    images: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    heads: int | None = None


def read_beside(path: Path) -> Beside:
    """The facts beside the weights in a folder, or beside a file of one.

    Raises:
      ValueError: for a file that holds no JSON object, numbers that are none, and a network whose
        tensors look like a plain ViT's and mean something else.
    """
    if not (path.is_dir() and weights_file(path)) and path.name not in FOLDER_FILES:
        return Beside()
    folder = path if path.is_dir() else path.parent
    file, about = folder / CONFIG, _read(folder / CONFIG)
    timm = about.get("pretrained_cfg", about)
    if not isinstance(timm, dict):
        raise ValueError(f"{file}: pretrained_cfg={brief(timm)} must be a dictionary")
    heads = _require_plain(about, file) if "architecture" in about else None
    images = _numbers(timm, TIMM, file)
    if not images and (folder / PREPROCESSOR).is_file():
        file = folder / PREPROCESSOR
        images = _numbers(_read(file), HUGGING_FACE, file)
    return Beside(str(file), images, heads) if images or heads else Beside()


def require_same_images(beside: Beside, config: Config, overridden: Collection[str] = ()) -> None:
    """Raises ValueError where a folder says another mean or std than config.data.

    Args:
      beside: see `read_beside`.
      config: that the weights are read with.
      overridden: fields such as "data.mean" that the user gave by name, which count.
    """
    for name, numbers in beside.images.items():
        ours = getattr(config.data, name)
        if f"data.{name}" not in overridden and not same_numbers(numbers, ours):
            raise ValueError(
                f"{beside.file} says {name}={numbers}, and config.data.{name}={ours}: images would "
                f"be other numbers than the network knows. Give --config.data.{name}="
                f"{','.join(map(str, numbers))}, as a run that uses these weights must too"
            )


def _require_plain(about: Mapping[str, Any], file: Path) -> int | None:
    """Raises ValueError for a network of timm's that has the tensors of a plain ViT and computes
    something else; returns its heads, where they are stated."""
    arguments = about.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{file}: model_args={brief(arguments)} must be a dictionary")
    pool = arguments.get("global_pool", about.get("global_pool"))
    if not any(pool == known for known in POOLS):
        raise ValueError(
            f"{file} says global_pool={brief(pool)}, and m2mKD's ViT classifies by its class "
            "token, global_pool='token'; take another model"
        )
    if odd := sorted(str(name) for name in arguments if name not in HARMLESS):
        raise ValueError(
            f"{file} says model_args with {brief(odd)}, which may change what the network computes "
            "and is not supported; take a model without"
        )
    heads = arguments.get("num_heads")
    if heads is not None and not (type(heads) is int and 0 < heads <= 1024):
        raise ValueError(f"{file}: num_heads={brief(heads)} must be a whole number above 0")
    return heads


def _numbers(
    content: Mapping[str, Any], keys: Mapping[str, str], file: Path
) -> dict[str, tuple[float, ...]]:
    """Mean and std, where a file has them."""
    found = {}
    for name, key in keys.items():
        if (value := content.get(key)) is None:
            continue
        if not (
            isinstance(value, list)
            and 0 < len(value) <= 16
            and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
            and all(abs(x) < 1e6 and (name == "mean" or x > 0) for x in value)
            and not any(math.isnan(x) for x in value)
        ):
            raise ValueError(f"{file}: {key}={brief(value)} must be a list of numbers")
        found[name] = tuple(map(float, value))
    return found


def _read(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}
