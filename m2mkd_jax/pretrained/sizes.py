"""The config of a ViT or V-MoE, inferred from its tensors."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from common_jax.config import FieldError
from common_jax.untrusted import brief
from m2mkd_jax.config import Config
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.pretrained.foreign import foreign_parts
from m2mkd_jax.pretrained.kinds import KINDS, Kind, alias_depths
from m2mkd_jax.pretrained.parts import OF_CLIP, PARTS, SIZES, published, read_parts
from m2mkd_jax.pretrained.reading import File, Source
from m2mkd_jax.stages import stage_name

# Mean and std of ImageNet's images, as DeiT and m2mKD have them.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# What the published networks have, where no tensor of a middle module says it.
PUBLISHED_PATCH = 16
PUBLISHED_DATA = {"image_size": 224, "channels": 3, "labels": 1000}


@dataclasses.dataclass(frozen=True)
class Inferred:
    """A config, and where it is from.

    Attributes:
      config: the default config with the sizes of a file.
      read: "config.x.y" -> value, from the tensors or the numbers beside them.
      assumed: the same of what nothing in the file says, as published networks have it.
    """

    config: Config
    read: Mapping[str, Any]
    assumed: Mapping[str, Any]


def infer_config(source: Source, given: Collection[str] = ()) -> Inferred:
    """The config of a source of a ViT or a whole V-MoE.

    Args:
      source: see `find_source`.
      given: fields such as "teacher.heads" that the caller sets, and that no file need say.

    Raises:
      ValueError: for a kind whose tensors do not say it, for a network with parts that have no
        place here, and for sizes of no published network, whose number of heads is in no tensor.
    """
    kind, file, section = KINDS[source.kind], source.files[0], KINDS[source.kind].section
    tensors = _gather(source)
    _require_inferable(source, tensors)
    stated = {*given, *(f"{section}.{name}" for name in file.beside.fields)}
    stated |= {f"data.{name}" for name in file.beside.images}
    sizes, assumed, data = _read_fields(tensors, file, section, stated)
    assumed_data = _assumed_data(sizes, data)
    if depths := _depths(source, kind):
        sizes["depths"] = depths
    assumed["depths"] = _assumed_depths(source)
    moe, meta = {}, {"depths": (1,) * len((assumed | sizes)["depths"])}
    read = {f"config.data.{name}": x for name, x in data.items()}
    if source.kind == "vmoe":
        moe["moe"], sizes["moe_blocks"] = _moe_sizes(tensors)
        read["config.model.moe.experts"] = moe["moe"].experts
        if (stitch := _first(tensors, "pre_stitch.ln.weight")) is not None:
            sizes["stitches"] = "kept"
            read["config.meta.width"] = meta["width"] = stitch.shape[0]
    config = Config()
    try:
        network = kind.sizes(**assumed | sizes | moe)
    except FieldError as error:
        raise ValueError(f"{file.path} says config.{section} with {error}") from None
    networks = {"meta": dataclasses.replace(config.meta, **meta), section: network}
    images = dataclasses.replace(config.data, **assumed_data | data)
    plain = ViTConfig()  # a part that it has not either need not be listed
    read |= {
        f"config.{section}.{name}": x
        for name, x in sizes.items()
        if name not in PARTS or x != getattr(plain, name)
    }
    shown = {f"config.{section}.{name}": x for name, x in assumed.items() if name not in sizes}
    shown |= {f"config.data.{name}": x for name, x in assumed_data.items()}
    return Inferred(dataclasses.replace(config, data=images, **networks), read, shown)


def _require_inferable(source: Source, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for a kind, and for parts of a network, that no config can be inferred
    for."""
    kind, file = KINDS[source.kind], source.files[0]
    if kind.is_nac or source.kind == "vmoe_student":
        example = "configs/m2mkd/nac_imagenet.py" if kind.is_nac else "configs/m2mkd/vmoe_base.py"
        raise ValueError(
            f"{file.path}: the tensors of kind={source.kind!r} do not say all of the "
            f"network that they are of; give its config, such as --config={example}"
        )
    if parts := foreign_parts(tensors):
        raise ValueError(
            f"{file.path} has {parts}, which m2mKD's ViT has no place for, whatever the "
            "config: take a model without, such as timm's deit_base_patch16_224 or "
            "vit_base_patch16_224"
        )


def _assumed_data(sizes: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.data that a file does not say, as the published networks have them."""
    assumed = {name: x for name, x in PUBLISHED_DATA.items() if name not in data}
    channels = (data | assumed)["channels"]
    for name, numbers in IMAGENET.items():
        if name not in data:
            siglip = sizes.get("class_token") is False  # which is trained with 0.5
            plain = siglip or channels != len(numbers)
            assumed[name] = (0.5,) * channels if plain else numbers
    return assumed


def _assumed_depths(source: Source) -> tuple[int, ...]:
    """A stage per block of a meta model, and one stage of any other network."""
    names = source.files[0].tensors
    blocks = {m[1] for m in (re.match(r"blocks\.(\d{1,4})\.", name) for name in names) if m}
    count = max(1, len(blocks))
    return (1,) * count if source.kind == "meta" else (count,)


def _gather(source: Source) -> dict[str, np.ndarray]:
    """The tensors of all files by their names, those of a module's blocks under its own."""
    tensors = {}
    for number, file in enumerate(source.files):
        own = {re.sub(r"^stages\.\d+\.", "", n): x for n, x in file.tensors.items()}
        several = len(source.files) > 1
        tensors |= {f"{stage_name(number)}.{n}" if several else n: x for n, x in own.items()}
        tensors |= {n: x for n, x in own.items() if not n.startswith("blocks.")}
    return tensors


def _first(tensors: Mapping[str, np.ndarray], suffix: str) -> np.ndarray | None:
    return next((x for name, x in tensors.items() if name.endswith(suffix)), None)


def _read_fields(
    tensors: Mapping[str, np.ndarray], file: File, section: str, given: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Fields of the network's section that a file says, those that are assumed, and fields of
    config.data; `given` are fields such as "teacher.heads" that are stated elsewhere."""
    width, hidden = _widths(tensors, file)
    sizes = {"width": width, "qkv_bias": _first(tensors, "attn.qkv.bias") is not None}
    data, assumed = {}, {}
    if (patch := tensors.get("patch_embed.proj.weight")) is not None and patch.ndim == 4:
        sizes["patch"], data["channels"] = patch.shape[-1], patch.shape[1]
    else:
        assumed["patch"] = PUBLISHED_PATCH
    if (head := tensors.get("head.weight")) is not None and head.ndim == 2:
        data["labels"] = head.shape[0]
    parts, assumed_parts, side = read_parts(tensors, width, file.beside, file.path)
    data |= side
    told = sizes | assumed_parts | parts | {"hidden": hidden} | side
    is_moe = _first(tensors, "htoh4.bias") is not None
    same = published(told, _name(file), is_moe=is_moe)
    assumed |= assumed_parts | _as_published(same, told, file, section, given)
    ratios = {config.mlp_ratio for config in same}
    sizes["mlp_ratio"] = ratios.pop() if len(ratios) == 1 else _ratio(hidden, width)
    if parts["layer_scale"] is not None:
        del parts["layer_scale"]  # the tensors hold what was learned, and not the start
    return sizes | parts | file.beside.fields, assumed, data | file.beside.images


def _widths(tensors: Mapping[str, np.ndarray], file: File) -> tuple[int, int]:
    """The width of a token, and of an MLP's hidden layer."""
    blocks = {name: x for name, x in tensors.items() if not name.startswith("attn_pool.")}
    norm = _first(blocks, "norm1.weight")
    hidden = _first(blocks, "mlp.fc1.bias")
    hidden = _first(blocks, "htoh4.bias") if hidden is None else hidden
    if norm is None or hidden is None:
        raise ValueError(
            f"{file.path} does not say its sizes: blocks.<i>.norm1.weight and an mlp.fc1.bias or "
            "moe.experts.<e>.htoh4.bias are needed; give a --config"
        )
    if norm.ndim != 1 or not norm.size or hidden.ndim < 1:
        raise ValueError(
            f"{file.path} does not say its sizes: a norm1.weight is {norm.shape}, and an MLP's "
            f"bias is {hidden.shape}"
        )
    return norm.shape[0], hidden.shape[-1]


def _ratio(hidden: int, width: int) -> float:
    """`mlp_ratio` for a hidden width, which is the whole part of its product with the width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _as_published(
    same: Sequence[ViTConfig],
    told: Mapping[str, Any],
    file: File,
    section: str,
    given: Collection[str],
) -> dict[str, Any]:
    """Fields that no tensor shows, as all of the published networks `same` have them; the config's
    defaults where the heads are given and there is no such network.

    Raises:
      ValueError: where the heads are not given and no published network says them, and where a
        network of CLIP's is none of the published ones and the fields that it needs are not given.
    """
    fields = {}
    for name in ("heads", "norm_eps", "activation", "layer_scale"):
        values = {getattr(config, name) for config in same}
        fields[name] = values.pop() if len(values) == 1 else None
    if (fields["heads"] is None or fields["norm_eps"] is None) and f"{section}.heads" not in given:
        shown = {name: told[name] for name in SIZES}
        where = "model" if section == "model" else "teacher (or meta)"
        raise ValueError(
            f"{file.path} is of no published network, {shown}, and its tensors do not say the "
            f"number of heads: give --config.SECTION.heads=N, SECTION being {where}, or a "
            "--config"
        )
    if told.get("norm_pre") and not any(config.norm_pre for config in same):
        needed = [*(f"{section}.{name}" for name in OF_CLIP), "data.mean", "data.std"]
        if missing := [name for name in needed if name not in given]:
            raise ValueError(
                f"{file.path} has a norm before its blocks (norm_pre), as CLIP's networks have, "
                "whose tensors do not say how they compute: give "
                f"{', '.join(f'--config.{name}' for name in missing)}"
            )
    default = {"heads": 1, "norm_eps": ViTConfig().norm_eps, "activation": ViTConfig().activation}
    default["layer_scale"] = told["layer_scale"]
    if told["layer_scale"] is None:
        del default["layer_scale"], fields["layer_scale"]
    return default | {name: x for name, x in fields.items() if x is not None}


def _name(file: File) -> str:
    """timm's name of the network, where anything says it."""
    name = file.beside.architecture or file.plain.get("model_name")
    return name if isinstance(name, str) else ""


def _depths(source: Source, kind: Kind) -> tuple[int, ...]:
    """Blocks in each stage: as the file lists its stages, or its divided_depths; () of a whole
    network without either."""
    file = source.files[0]
    divided = file.plain.get("divided_depths")
    if divided and not (
        isinstance(divided, list | tuple)
        and len(divided) <= 1000
        and all(type(depth) is int and 0 < depth <= 1000 for depth in divided)
    ):
        raise ValueError(
            f"{file.path} has divided_depths={brief(divided)}, which should be the number of "
            "blocks in each stage"
        )
    depths = tuple(divided) if divided else alias_depths(file.tensors)
    if kind.single and not depths:
        raise ValueError(
            f"{file.path} does not say how many blocks each stage of its network has: give a "
            f"--config, or --config.{kind.section}.depths=6,6,6,6"
        )
    return depths


def _moe_sizes(tensors: Mapping[str, np.ndarray]) -> tuple[MoeConfig, str]:
    """The mixture of experts, and the blocks that have one."""
    gate = _first(tensors, "moe.gate.gate.weight")
    matches = (re.match(r"blocks\.(\d+)\.moe\.", name) for name in tensors)
    blocks = ",".join(str(i) for i in sorted({int(m[1]) for m in matches if m})) or "none"
    bias = _first(tensors, "moe.gate.gate.bias") is not None
    experts = MoeConfig().experts if gate is None else gate.shape[0]
    return MoeConfig(experts=experts, router_bias=bias), blocks
