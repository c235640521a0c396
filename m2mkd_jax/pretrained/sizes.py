"""The config of a ViT or V-MoE as its tensors tell it."""

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
# What the published networks have, where no tensor of a middle module tells it.
PUBLISHED = {"patch": 16, "image_size": 224, "channels": 3, "labels": 1000}


@dataclasses.dataclass(frozen=True)
class Told:
    """A config, and how it came about.

    Attributes:
      config: the default config with the sizes of a file.
      told: "config.x.y" -> value, as the tensors or the numbers beside them tell it.
      assumed: the same of what nothing in the file tells, as published networks have it.
    """

    config: Config
    told: Mapping[str, Any]
    assumed: Mapping[str, Any]


def tell_config(source: Source, given: Collection[str] = ()) -> Told:
    """The config of a source of a ViT or a whole V-MoE.

    Args:
      source: see `find_source`.
      given: fields such as "teacher.heads" that the caller sets, and that need not be told.

    Raises:
      ValueError: for a kind whose tensors do not tell it, for a network with parts that have no
        place here, and for sizes of no published network, whose number of heads is in no tensor.
    """
    kind = KINDS[source.kind]
    if kind.is_nac or source.kind == "vmoe_student":
        example = "configs/m2mkd/nac_imagenet.py" if kind.is_nac else "configs/m2mkd/vmoe_base.py"
        raise ValueError(
            f"{source.files[0].path}: the tensors of kind={source.kind!r} do not tell all of the "
            f"network that they are of; give its config, such as --config={example}"
        )
    tensors = _gather(source)
    if parts := foreign_parts(tensors):
        raise ValueError(
            f"{source.files[0].path} has {parts}, which m2mKD's ViT has no place for, whatever the "
            "config: take a model without, such as timm's deit_base_patch16_224 or "
            "vit_base_patch16_224"
        )
    told, assumed = {}, {}
    heads_given = f"{kind.section}.heads" in given
    data, sizes = _read_sizes(tensors, source.files[0], told, assumed, heads_given=heads_given)
    sizes["depths"] = _depths(source, kind, told, assumed)
    section, config = kind.section, Config()
    meta = dataclasses.replace(config.meta, depths=(1,) * len(sizes["depths"]))
    if source.kind == "vmoe":
        sizes |= _moe_sizes(tensors, told)
        if width := _stitch_width(tensors):
            meta = dataclasses.replace(meta, width=width)
            told |= {"config.model.stitches": "kept", "config.meta.width": width}
            sizes["stitches"] = "kept"
    told = {path.format(section=section): value for path, value in told.items()}
    assumed = {path.format(section=section): value for path, value in assumed.items()}
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data),
        **{"meta": meta} | {section: kind.sizes(**sizes)},
    )
    return Told(config, told, assumed)


def _gather(source: Source) -> dict[str, np.ndarray]:
    """The tensors of all files by their names, those of a module's blocks under its own."""
    tensors = {}
    for number, file in enumerate(source.files):
        held = {re.sub(r"^stages\.\d+\.", "", n): x for n, x in file.tensors.items()}
        several = len(source.files) > 1
        tensors |= {f"{stage_name(number)}.{n}" if several else n: x for n, x in held.items()}
        tensors |= {n: x for n, x in held.items() if not n.startswith("blocks.")}
    return tensors


def _first(tensors: Mapping[str, np.ndarray], suffix: str) -> np.ndarray | None:
    return next((x for name, x in tensors.items() if name.endswith(suffix)), None)


def _read_sizes(
    tensors: Mapping[str, np.ndarray], file: File, told: dict, assumed: dict, *, heads_given: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of config.data and of the network's section; which of them are told and assumed."""
    norm = _first(tensors, "norm1.weight")
    hidden = _first(tensors, "mlp.fc1.bias")
    hidden = _first(tensors, "htoh4.bias") if hidden is None else hidden
    if norm is None or hidden is None:
        raise ValueError(
            f"{file.path} does not tell its sizes: blocks.<i>.norm1.weight and an mlp.fc1.bias or "
            "moe.experts.<e>.htoh4.bias are needed; give a --config"
        )
    if norm.ndim != 1 or not norm.size or hidden.ndim < 1:
        raise ValueError(
            f"{file.path} does not tell its sizes: a norm1.weight is {norm.shape}, and an MLP's "
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
    data |= file.said.images
    told |= {f"config.{{section}}.{name}": value for name, value in sizes.items()}
    told |= {f"config.data.{name}": value for name, value in data.items()}
    for name, value in PUBLISHED.items():
        place, section = (sizes, "{section}") if name == "patch" else (data, "data")
        if name not in place:
            place[name] = assumed[f"config.{section}.{name}"] = value
    is_moe = _first(tensors, "htoh4.bias") is not None
    heads = _published(sizes, file, is_moe=is_moe, heads_given=heads_given)
    if file.said.heads:
        heads["heads"] = told["config.{section}.heads"] = file.said.heads
    assumed |= {
        f"config.{{section}}.{name}": value
        for name, value in heads.items()
        if f"config.{{section}}.{name}" not in told
    }
    for name, value in IMAGENET.items():
        if name not in data and data["channels"] == len(value):
            data[name] = assumed[f"config.data.{name}"] = value
        elif name not in data:
            data[name] = assumed[f"config.data.{name}"] = (0.5,) * data["channels"]
    return data, sizes | heads


def _published(
    sizes: Mapping[str, Any], file: File, *, is_moe: bool, heads_given: bool
) -> dict[str, Any]:
    """Heads and epsilon of the published networks of these sizes; the config's defaults where the
    heads are given, or said beside the file, and there is no such network."""
    fields = ("heads", "norm_eps")
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
    if len(same) != 1 and (heads_given or file.said.heads):
        return {"heads": 1, "norm_eps": ViTConfig().norm_eps}
    if len(same) != 1:
        shown = {name: sizes[name] for name in ("width", "mlp_ratio", "qkv_bias")}
        section = "model" if is_moe else "teacher (or meta)"
        raise ValueError(
            f"{file.path} is of no published network, {shown}, and its tensors do not tell the "
            f"number of heads: give --config.SECTION.heads=N, SECTION being {section}, or a "
            "--config"
        )
    return dict(zip(fields, same.pop(), strict=True))


def _depths(source: Source, kind: Kind, told: dict, assumed: dict) -> tuple[int, ...]:
    """Blocks in each stage: as the file lists its stages, or its divided_depths; of a whole network
    without either, a stage a block of a meta model and one stage of any other."""
    file, path = source.files[0], "config.{section}.depths"
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
    listed = alias_depths(file.tensors)
    depths = tuple(divided) if divided else listed
    if depths:
        told[path] = depths
        return depths
    if kind.single:
        raise ValueError(
            f"{file.path} does not tell how many blocks each stage of its network has: give a "
            f"--config, or --config.{kind.section}.depths=6,6,6,6"
        )
    blocks = {m[1] for m in (re.match(r"blocks\.(\d{1,4})\.", n) for n in file.tensors) if m}
    count = max(1, len(blocks))
    assumed[path] = (1,) * count if source.kind == "meta" else (count,)
    return assumed[path]


def _moe_sizes(tensors: Mapping[str, np.ndarray], told: dict) -> dict[str, Any]:
    gate = _first(tensors, "moe.gate.gate.weight")
    matches = (re.match(r"blocks\.(\d+)\.moe\.", name) for name in tensors)
    blocks = ",".join(str(i) for i in sorted({int(m[1]) for m in matches if m})) or "none"
    bias = _first(tensors, "moe.gate.gate.bias") is not None
    experts = MoeConfig().experts if gate is None else gate.shape[0]
    told |= {"config.model.moe.experts": experts, "config.model.moe_blocks": blocks}
    return {"moe": MoeConfig(experts=experts, router_bias=bias), "moe_blocks": blocks}


def _stitch_width(tensors: Mapping[str, np.ndarray]) -> int | None:
    stitch = _first(tensors, "pre_stitch.ln.weight")
    return None if stitch is None else stitch.shape[0]
