"""Facts about a ViT that timm's and Hugging Face's folders state beside its weights."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common_jax.nn.mlp import ACTIVATIONS
from common_jax.untrusted import brief
from common_jax.weights.beside import PROCESSORS, image_processors
from common_jax.weights.beside import read_beside as read_files
from m2mkd_jax.config import Config
from m2mkd_jax.data.augment import SMALL_SIDE
from m2mkd_jax.phases.sources.weights import same_numbers
from m2mkd_jax.pretrained.timm_names import TIMM_VITS, UNSUPPORTED

CONFIG = "config.json"
CROP = 224 / 256  # share of the shorter side that evaluation keeps, see `resize_and_centre`
# Field of config.data -> its name in timm's pretrained_cfg, and in Hugging Face's preprocessor.
TIMM = {"mean": "mean", "std": "std"}
HUGGING_FACE = {"mean": "image_mean", "std": "image_std"}
# timm's global_pool -> `pool` of a ViT's section.
POOLS = {"token": "class", "avg": "mean", "map": "attention"}
# Keys of timm's pretrained_cfg -> the values that agree with evaluation here.
PREPARED = {"interpolation": ["bicubic"], "crop_mode": ["center"], "crop_pct": [CROP]}
# Arguments of timm's models that the tensors reveal, that are read here, or that have no effect in
# evaluation. Any other may change the computation without a trace in the tensors.
HARMLESS = (
    *("img_size", "num_classes", "in_chans", "patch_size", "embed_dim", "depth", "mlp_ratio"),
    *("qkv_bias", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"),
    *("pos_drop_rate", "patch_drop_rate", "weight_init", "dynamic_img_size", "global_pool"),
    *("init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "fc_norm"),
    *("num_heads", "act_layer"),
)
# Field of a ViT's section -> argument of timm's models, and our value for each supported one.
ARGUMENTS = {
    "pool": ("global_pool", POOLS),
    "activation": ("act_layer", {name: name for name in ACTIVATIONS}),
    "positions": ("no_embed_class", {True: "patches", False: "all"}),
}


@dataclasses.dataclass(frozen=True)
class Beside:
    """Facts that a folder states about its weights.

    Attributes:
      file: the file that states them; "" if none does.
      image_file: likewise, for mean and std.
      fields: those of "data.mean" and "data.std", and of "heads", "activation", "norm_eps", "pool"
        and "positions" of the network's section of the config, that the folder states or that
        follow from the architecture.
      architecture: timm's name of the network, or "".
      notes: how the network's images were prepared, if otherwise than here.
      width: token width of timm's network of this name; None if the name is unknown or the folder
        has its own width.
    """

    file: str = ""
    image_file: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    architecture: str = ""
    width: int | None = None
    notes: tuple[str, ...] = ()


def paths(fields: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The fields by full path below `config`: fields of other sections already have it, the
    network's are put below `section`."""
    return {
        name if name.startswith(("data.", "meta.")) else f"{section}.{name}": value
        for name, value in fields.items()
    }


def read_beside(path: Path) -> Beside:
    """The facts beside the weights in a folder, or beside a file in a folder.

    Raises:
      ValueError: for a file that is not a JSON object, values that should be numbers but are not,
        and a network that has the tensors of a plain ViT but computes something else.
    """
    files = read_files(path, (CONFIG, *PROCESSORS))
    folder = path if path.is_dir() else path.parent
    file, about = folder / CONFIG, files.get(CONFIG, {})
    timm = about.get("pretrained_cfg", about)
    if not isinstance(timm, dict):
        raise ValueError(f"{file}: pretrained_cfg={brief(timm)} must be a dictionary")
    architecture = about.get("architecture") or ""
    if not isinstance(architecture, str):
        raise ValueError(f"{file}: architecture={brief(architecture)} must be a string")
    architecture = architecture.partition(".")[0]  # of the name's tag
    if odd := [what for name, what in UNSUPPORTED.items() if re.fullmatch(name, architecture)]:
        raise ValueError(
            f"{file} says architecture={brief(architecture)}, a network with {odd[0]}, which "
            "m2mKD's ViT does not support with any config: take another model, such as timm's "
            "deit_base_patch16_224 or vit_base_patch16_224"
        )
    fields = _network(about, file) if architecture else {}
    # timm builds the network from model_args, so these take precedence over the name.
    known = dict(TIMM_VITS.get(architecture, {}))
    width = known.pop("width", None)
    if "embed_dim" in (about.get("model_args") or {}):
        width = None
    images, image_file = _images(timm, TIMM, file), file
    if not images:
        image_file, images = _processed(files, folder, file)
    fields = images | known | fields
    return Beside(str(file), str(image_file), fields, architecture, width, _prepared(timm, file))


def require_same(
    beside: Beside, config: Config, section: str, overridden: Collection[str] = ()
) -> None:
    """Raises ValueError if what a folder states about the network (`section` of the config), mean
    or std contradicts the config, except for paths in `overridden`, such as "data.mean", that the
    user set."""
    for path, value in paths(beside.fields, section).items():
        parent, name = path.split(".")
        ours = getattr(getattr(config, parent), name, value)
        numbers = isinstance(value, tuple)
        file = beside.image_file if parent == "data" else beside.file
        same = same_numbers(value, ours) if numbers else value == ours
        if path not in overridden and not same:
            flag = ",".join(map(str, value)) if numbers else value
            raise ValueError(
                f"{file} says {name}={value!r}, but config.{path}={ours!r}: the network "
                f"would compute something else. Give --config.{path}={flag}, here and in every run "
                "that uses these weights"
            )


def _network(about: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The fields of a timm network that its tensors may not reveal; raises ValueError if it could
    have the tensors of one of our ViTs but compute something else."""
    arguments = about.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{file}: model_args={brief(arguments)} must be a dictionary")
    # timm builds the network from model_args, so these take precedence.
    arguments = {"global_pool": about.get("global_pool")} | arguments
    stated = {}
    for field, (key, known) in ARGUMENTS.items():
        value = arguments.get(key)
        if value in (None, ""):
            continue
        # In a list, since a value from JSON may be unhashable.
        if value not in list(known):
            raise ValueError(
                f"{file} says {key}={brief(value)}, but m2mKD's ViT only has "
                f"{', '.join(map(str, known))}; take another model"
            )
        stated[field] = known[value]
    if odd := sorted(str(name) for name in arguments if name not in HARMLESS):
        raise ValueError(
            f"{file} has model_args with {brief(odd)}, which may change what the network computes "
            "and are not supported; take a model without them"
        )
    if (heads := arguments.get("num_heads")) is not None:
        # Not isinstance: to it, true is an integer.
        if type(heads) is not int or not 0 < heads <= 1024:
            raise ValueError(f"{file}: num_heads={brief(heads)} must be a whole number above 0")
        stated["heads"] = heads
    return stated


def _prepared(timm: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    """A note on how images were prepared for a network of timm's, if otherwise than here."""
    size = timm.get("input_size")
    side = size[-1] if isinstance(size, list) and size and type(size[-1]) is int else None
    # Small images are not cropped here.
    small = side is not None and side <= SMALL_SIDE
    agreeing = PREPARED | ({"crop_pct": [1]} if small else {})
    said = {key: timm[key] for key in agreeing if timm.get(key) is not None}
    odd = {key: value for key, value in said.items() if value not in agreeing[key]}
    if not odd:
        return ()
    shown = ", ".join(f"{key}={brief(value)}" for key, value in odd.items())
    return (
        f"{file.name} says {shown} for evaluation, which is not read: here images are resized with "
        f"bicubic, and images above {SMALL_SIDE} pixels keep the centre {CROP:.3f} of their "
        "shorter side",
    )


def _processed(
    files: Mapping[str, Mapping[str, Any]], folder: Path, file: Path
) -> tuple[Path, dict[str, tuple[float, ...]]]:
    """The file with Hugging Face's settings of images, or `file` if there is none, and its mean and
    std. Raises ValueError if two files have others."""
    found = {
        name: _images(content, HUGGING_FACE, folder / name)
        for name, content in image_processors(files, str(folder)).items()
    }
    found = {name: images for name, images in found.items() if images}
    if len(found) > 1 and len(set(map(repr, found.values()))) > 1:
        raise ValueError(
            f"{folder}: {' and '.join(map(repr, found))} say different things, "
            f"{' and '.join(map(repr, found.values()))}; remove the wrong one"
        )
    if not found:
        return file, {}
    name, images = next(iter(found.items()))
    return folder / name, images


def _images(
    content: Mapping[str, Any], keys: Mapping[str, str], file: Path
) -> dict[str, tuple[float, ...]]:
    """Mean and std of images, if a file has them under these keys."""
    found = {}
    for name, key in keys.items():
        if (value := content.get(key)) is None:
            continue
        if not (
            isinstance(value, list)
            and 0 < len(value) <= 16
            and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
            and all(abs(x) < 1e6 and (name == "mean" or x > 0) for x in value)
        ):
            raise ValueError(f"{file}: {key}={brief(value)} must be a list of numbers")
        found[f"data.{name}"] = tuple(map(float, value))
    return found
