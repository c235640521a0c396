"""The parts of a ViT that its tensors show, and the published networks that have the same."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.models import vit, vmoe
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.pretrained.hub import Beside

Tensors = Mapping[str, np.ndarray]
SIZES = ("width", "hidden", "qkv_bias")  # that networks of one name must share
NEAREST = ("patch", "image_size")  # that tell networks of the same parts apart
# Layer scale is learned; a run that starts from scratch would start it here, as DINOv2 does.
LAYER_SCALE = 1e-5
# Fields of what a ViT has beside its blocks' sizes.
PARTS = (
    *("layer_scale", "class_token", "registers", "patch_bias", "norm_pre", "positions"),
    *("norm_after_pool", "pool"),
)
# Fields that tell CLIP's networks apart from others with the same tensors.
OF_CLIP = ("activation", "norm_eps")


def read_parts(
    tensors: Tensors, width: int, beside: Beside, file: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Fields of a ViT's section that its tensors show; of a part of a network, those of the part.

    `layer_scale` is a number where there is one, and not the one that training started from.

    Args:
      tensors: by timm's names.
      width: of a token.
      beside: facts that the folder states.
      file: what to call the tensors' origin in messages.

    Returns:
      The fields that are read, those that are assumed, and `image_size` where it is known.

    Raises:
      ValueError: for a position table that fits no square of patches, and registers of odd shape.
    """
    scaled = any(re.search(r"\bblocks\.\d+\.(ls1\.gamma|gamma_1)$", name) for name in tensors)
    read, assumed, data = {"layer_scale": LAYER_SCALE if scaled else None}, {}, {}
    if (kernel := tensors.get("patch_embed.proj.weight")) is not None:
        read |= {
            "class_token": "cls_token" in tensors,
            "registers": _registers(tensors, file),
            "patch_bias": "patch_embed.proj.bias" in tensors,
            "norm_pre": "norm_pre.weight" in tensors,
        }
        table = tensors.get("pos_embed")
        if table is not None and table.ndim == 3 and kernel.ndim == 4:
            found = _places(table.shape[1], read["class_token"], read["registers"])
            if not found:
                raise ValueError(
                    f"{file} has a position table of {table.shape[1]} rows, which are no square of "
                    "patches, with or without rows for the "
                    f"{read['class_token'] + read['registers']} tokens before them; take another "
                    "model"
                )
            stated = [place for place in found if place[0] == beside.fields.get("positions")]
            positions, side = (stated or found)[0]
            (read if stated or len(found) == 1 else assumed)["positions"] = positions
            data["image_size"] = side * kernel.shape[-1]
    if any(re.match(r"(fc_norm|norm|head|attn_pool)\.", name) for name in tensors):
        read["norm_after_pool"] = "fc_norm.weight" in tensors
        pool, is_read = _pool(tensors, width, beside, read)
        (read if is_read else assumed)["pool"] = pool
    return read, assumed, data


def published(told: Mapping[str, Any], name: str, *, is_moe: bool) -> list[ViTConfig]:
    """The published networks with the sizes of a file: those of its parts if there are any, and of
    these those of its patches and images if there are any.

    Args:
      told: fields of the section, "hidden" for the hidden width, and "image_size".
      name: of the network, or any other text.
      is_moe: whether it is a V-MoE.
    """
    cls, variants = (
        (VMoEConfig, vmoe.VARIANTS) if is_moe else (ViTConfig, vit.VARIANTS | vit.PRETRAINED)
    )
    if name in variants:
        variants = {name: variants[name]}
    known = [(cls(**fields), side) for side, _, fields in variants.values()]
    shown = [(config, _shown(config, side)) for config, side in known]
    sizes = _agreeing(shown, told, SIZES)
    parts = _agreeing(sizes, told, told.keys() - NEAREST)
    nearest = _agreeing(parts, told, NEAREST)
    return [config for config, _ in nearest or parts or sizes]


def _agreeing(
    shown: list[tuple[ViTConfig, dict[str, Any]]], told: Mapping[str, Any], fields: Collection[str]
) -> list[tuple[ViTConfig, dict[str, Any]]]:
    """Those that have the same in all of `fields` that are told."""
    scaled = {"layer_scale": told.get("layer_scale") is not None}
    expected = {field: x for field, x in (told | scaled).items() if field in fields}
    return [(config, own) for config, own in shown if all(own[f] == x for f, x in expected.items())]


def _shown(config: ViTConfig, side: int) -> dict[str, Any]:
    """A network's fields as its tensors show them."""
    fields = vars(config) | {"hidden": config.encoder.hidden, "image_size": side}
    return fields | {"layer_scale": config.layer_scale is not None}


def _registers(tensors: Tensors, file: Path) -> int:
    for name in ("reg_token", "register_tokens"):
        if (tokens := tensors.get(name)) is not None:
            if tokens.ndim != 3 or not tokens.shape[1]:
                raise ValueError(f"{file} does not say its sizes: {name} is {tokens.shape}")
            return tokens.shape[1]
    return 0


def _places(rows: int, class_token: bool, registers: int) -> list[tuple[str, int]]:
    """Ways to read a position table: `positions` and the side of the square of patches, the
    likeliest first."""
    before = {class_token + registers: "all"}
    if class_token:
        before.setdefault(1, "class")
    before.setdefault(0, "patches")
    found = [
        (positions, math.isqrt(rows - count))
        for count, positions in before.items()
        if rows > count and math.isqrt(rows - count) ** 2 == rows - count
    ]
    return found if class_token else found[::-1]


def _pool(
    tensors: Tensors, width: int, beside: Beside, read: Mapping[str, Any]
) -> tuple[str, bool]:
    """The pooling, and whether anything says it."""
    head = tensors.get("head.weight")
    if head is not None and head.ndim == 2 and head.shape[1] == 2 * width:
        return "class_and_mean", True
    if "pool" in beside.fields:
        return beside.fields["pool"], True
    if any(name.startswith("attn_pool.") for name in tensors):
        return "attention", True
    if read.get("class_token") is False:
        return "mean", True
    # Of timm's models with fc_norm nearly all take the mean; of those with norm, the class token.
    return ("mean", False) if read["norm_after_pool"] else ("class", True)
