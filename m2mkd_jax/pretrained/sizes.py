"""The config of a ViT or V-MoE, inferred from its tensors."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from common_jax.untrusted import brief
from m2mkd_jax.config import Config
from m2mkd_jax.models import vit, vmoe
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.pretrained.foreign import foreign_parts
from m2mkd_jax.pretrained.kinds import KINDS, Kind, alias_depths
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
    sizes, data = _read_sizes(tensors, file)
    if file.beside.heads:
        sizes["heads"] = file.beside.heads
    if depths := _depths(source, kind):
        sizes["depths"] = depths
    heads_given = f"{section}.heads" in given or "heads" in sizes
    more_sizes = {"patch": PUBLISHED_PATCH, **_published(tensors, sizes, file, heads_given)}
    more_sizes["depths"] = _assumed_depths(source)
    more_data = _assumed_data(data)
    moe, meta = {}, {"depths": (1,) * len((more_sizes | sizes)["depths"])}
    read = {f"config.data.{name}": x for name, x in data.items()}
    if source.kind == "vmoe":
        moe["moe"], sizes["moe_blocks"] = _moe_sizes(tensors)
        read["config.model.moe.experts"] = moe["moe"].experts
        if (stitch := _first(tensors, "pre_stitch.ln.weight")) is not None:
            sizes["stitches"] = "kept"
            read["config.meta.width"] = meta["width"] = stitch.shape[0]
    read |= {f"config.{section}.{name}": x for name, x in sizes.items()}
    assumed = {f"config.{section}.{name}": x for name, x in more_sizes.items()}
    assumed |= {f"config.data.{name}": x for name, x in more_data.items()}
    config = Config()
    networks = {
        "meta": dataclasses.replace(config.meta, **meta),
        section: kind.sizes(**more_sizes | sizes | moe),
    }
    images = dataclasses.replace(config.data, **more_data | data)
    return Inferred(
        dataclasses.replace(config, data=images, **networks),
        read,
        {name: x for name, x in assumed.items() if name not in read},
    )


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


def _assumed_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.data that a file does not say."""
    assumed = {name: x for name, x in PUBLISHED_DATA.items() if name not in data}
    channels = (assumed | data)["channels"]
    for name, numbers in IMAGENET.items():
        if name not in data:
            assumed[name] = numbers if channels == len(numbers) else (0.5,) * channels
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


def _read_sizes(
    tensors: Mapping[str, np.ndarray], file: File
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the network's section and of config.data that a file says."""
    norm = _first(tensors, "norm1.weight")
    hidden = _first(tensors, "mlp.fc1.bias")
    hidden = _first(tensors, "htoh4.bias") if hidden is None else hidden
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
    width = norm.shape[0]
    sizes = {
        "width": width,
        "mlp_ratio": hidden.shape[-1] / width,
        "qkv_bias": _first(tensors, "attn.qkv.bias") is not None,
    }
    data = {}
    if (patch := tensors.get("patch_embed.proj.weight")) is not None and patch.ndim == 4:
        sizes["patch"], data["channels"] = patch.shape[-1], patch.shape[1]
    if (table := tensors.get("pos_embed")) is not None and "patch" in sizes and table.ndim == 3:
        side = math.isqrt(max(table.shape[1] - 1, 0))
        if side == 0 or side * side + 1 != table.shape[1]:
            raise ValueError(
                f"{file.path} has a position table of {table.shape[1]} rows, which are no square "
                "of patches and a class token: m2mKD's ViT needs both; take another model"
            )
        data["image_size"] = side * sizes["patch"]
    if (head := tensors.get("head.weight")) is not None and head.ndim == 2:
        data["labels"] = head.shape[0]
    return sizes, data | file.beside.images


def _published(
    tensors: Mapping[str, np.ndarray], sizes: Mapping[str, Any], file: File, heads_given: bool
) -> dict[str, Any]:
    """Heads and epsilon of the published networks of these sizes; the config's defaults where the
    heads are given, or stated beside the file, and there is no such network."""
    fields, is_moe = ("heads", "norm_eps"), _first(tensors, "htoh4.bias") is not None
    if is_moe:
        known = [VMoEConfig(**changes) for _, _, changes in vmoe.VARIANTS.values()]
    else:
        name = file.plain.get("model_name")
        variants = vit.VARIANTS
        if isinstance(name, str) and name in variants:
            variants = {name: variants[name]}
        known = [ViTConfig(**changes) for _, _, changes in variants.values()]
    same = {
        tuple(getattr(one, field) for field in fields)
        for one in known
        if all(getattr(one, name) == sizes[name] for name in ("width", "mlp_ratio", "qkv_bias"))
    }
    if len(same) != 1 and heads_given:
        return {"heads": 1, "norm_eps": ViTConfig().norm_eps}
    if len(same) != 1:
        shown = {name: sizes[name] for name in ("width", "mlp_ratio", "qkv_bias")}
        section = "model" if is_moe else "teacher (or meta)"
        raise ValueError(
            f"{file.path} is of no published network, {shown}, and its tensors do not say the "
            f"number of heads: give --config.SECTION.heads=N, SECTION being {section}, or a "
            "--config"
        )
    return dict(zip(fields, same.pop(), strict=True))


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
