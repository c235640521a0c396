"""Facts about a ViT that folders of timm and Hugging Face state beside its weights."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common_jax.nn.mlp import ACTIVATIONS
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
    *("init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "fc_norm"),
    *("num_heads", "act_layer"),
)
# timm's global_pool -> `pool` of a ViT's section.
POOLS = {"token": "class", "avg": "mean", "map": "attention"}


@dataclasses.dataclass(frozen=True)
class Beside:
    """Facts that a folder states about its weights.

    Attributes:
      file: that states them; "" where none does.
      images: "mean" and "std" of config.data, by these names.
      fields: of the network's section of the config, by their names: "heads", "activation",
        "pool" and "positions", those that the folder states.
      architecture: timm's name of the network, or "".
    """

    file: str = ""
    images: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    architecture: str = ""


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
    architecture = about.get("architecture") or ""
    if not isinstance(architecture, str):
        raise ValueError(f"{file}: architecture={brief(architecture)} must be a text")
    fields = _stated_fields(about, file) if architecture else {}
    images = _numbers(timm, TIMM, file)
    if not images and (folder / PREPROCESSOR).is_file():
        file = folder / PREPROCESSOR
        images = _numbers(_read(file), HUGGING_FACE, file)
    stated = images or fields or architecture
    return Beside(str(file), images, fields, architecture) if stated else Beside()


def require_same(
    beside: Beside, config: Config, section: str, overridden: Collection[str] = ()
) -> None:
    """Raises ValueError where a folder says another network, mean or std than the config.

    Args:
      beside: see `read_beside`.
      config: that the weights are read with.
      section: field of the config with the network's sizes.
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
    for name, value in beside.fields.items():
        ours = getattr(getattr(config, section), name, value)
        if f"{section}.{name}" not in overridden and ours != value:
            raise ValueError(
                f"{beside.file} says {name}={value!r}, and config.{section}.{name}={ours!r}: the "
                f"network would compute something else. Give --config.{section}.{name}={value}, as "
                "a run that uses these weights must too"
            )


def _stated_fields(about: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The fields of a network of timm's that its tensors need not show; raises ValueError where it
    has the tensors of one of our ViTs and computes something else."""
    arguments = about.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{file}: model_args={brief(arguments)} must be a dictionary")
    stated = {
        "pool": _stated(arguments, "global_pool", POOLS, file, about.get("global_pool")),
        "activation": _stated(arguments, "act_layer", {name: name for name in ACTIVATIONS}, file),
    }
    if odd := sorted(str(name) for name in arguments if name not in HARMLESS):
        raise ValueError(
            f"{file} says model_args with {brief(odd)}, which may change what the network computes "
            "and is not supported; take a model without"
        )
    heads = arguments.get("num_heads")
    if heads is not None and not (type(heads) is int and 0 < heads <= 1024):
        raise ValueError(f"{file}: num_heads={brief(heads)} must be a whole number above 0")
    if (patches_alone := arguments.get("no_embed_class")) is not None:
        stated["positions"] = "patches" if patches_alone else "all"
    stated["heads"] = heads
    return {name: value for name, value in stated.items() if value is not None}


def _stated(
    arguments: Mapping[str, Any],
    key: str,
    known: Mapping[str, str],
    file: Path,
    default: Any = None,
) -> str | None:
    """Our value of an argument of timm's, None where it is not stated; raises ValueError for one
    that is not known here."""
    value = arguments.get(key, default)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            f"{file} says {key}={brief(value)}, and m2mKD's ViT has {', '.join(known)} alone; take "
            "another model"
        )
    return known[value]


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
