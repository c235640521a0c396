"""Parts of ViTs by their tensor names: which config fields they reveal, and which parts of other
ViTs are not supported."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]
# Regex of names -> the part. There is no config for a file that has them.
FOREIGN = {
    r"dist_token|head_dist\..*": "a distillation token",
    r"pre_logits\..*": "a layer before the head (pre_logits)",
    r"(blocks\.\d+\.attn|attn_pool)\.[qk]_norm\..*": "norms of queries and keys",
    r"blocks\.\d+\.attn\.(relative_position.*|rel_pos.*)|rel_pos.*": "relative positions",
    r"attn_pool\.pos_embed": "positions in its pooling",
    r"(.*\.)?rope(\..*|_.*)?|(.*\.)?freqs(_.*)?": "rotary positions",
    r"blocks\.\d+\.mlp\.(w12|w3|w1|w2|fc1_g|fc1_x|norm)\..*": "gated or normed MLPs",
    r"patch_embed\.(backbone|norm|proj\.\d+)\..*": "another patch embedding",
}
# Field of a ViT's section -> regex of the tensors whose presence or shape it decides.
PARTS = {
    "class_token": r"cls_token",
    "registers": r"reg_token|register_tokens",
    "positions": r"pos_embed",
    "patch_bias": r"patch_embed\.proj\.bias",
    "norm_pre": r"norm_pre\..*",
    "layer_scale": r"blocks\.\d+\.(ls\d\.gamma|gamma_\d)",
    "qkv_bias": r"blocks\.\d+\.attn\.qkv\.bias",
    "norm_after_pool": r"(fc_)?norm\.\w+",
    "pool": r"attn_pool\..*|(fc_)?norm\.\w+",
}
# Tensor names in the ViTs of Hugging Face and torchvision.
ELSEWHERE = {
    r"(\w+\.)?(embeddings\.(cls_token|patch_embeddings?\..*)|encoder\.layers?\.\d+\..*)": (
        "Hugging Face's"
    ),
    r"encoder\.layers\.encoder_layer_\d+\..*|conv_proj\.weight|class_token": "torchvision's",
}
# Tensors only have the learned layer scale; a run from scratch would start it here, like DINOv2.
LAYER_SCALE = 1e-5


def foreign_parts(names: Collection[str]) -> str:
    """A message about unsupported parts of a ViT, with a tensor name for each; "" if there are
    none."""
    examples = {what: find(names, regex) for regex, what in FOREIGN.items()}
    parts = ", ".join(f"{what} ({name})" for what, name in examples.items() if name)
    return parts and (
        f"the network in the file has {parts}, which m2mKD's ViT does not support with any config: "
        "take a model without them, such as timm's deit_base_patch16_224 or "
        "vit_base_patch16_224"
    )


def is_headless(names: Collection[str]) -> bool:
    """True for the names of a whole ViT without classifier, as timm saves it with
    num_classes=0."""
    ends, starts = find(names, r"norm\.weight|fc_norm\..*"), find(names, "cls_token|pos_embed")
    return bool(ends and starts) and "head.weight" not in names


def find(names: Iterable[str], regex: str) -> str:
    """The first name that fully matches, or ""."""
    return next((name for name in names if re.fullmatch(regex, name)), "")


def read_parts(
    tensors: Tensors, width: int, stated: Mapping[str, Any], file: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that the tensors reveal, and those that are assumed; for a stage, only the fields
    of its parts.

    Names are timm's; `width` is the token width, `stated` are fields that the file's folder states,
    and `file` is for messages. `layer_scale` is a number if there is layer scale, but not the one
    that training started from.

    Raises:
      ValueError: for a position table that fits no square of patches, and registers of odd shape.
    """
    has = {field: bool(find(tensors, regex)) for field, regex in PARTS.items()}
    read = {"qkv_bias": has["qkv_bias"], "layer_scale": LAYER_SCALE if has["layer_scale"] else None}
    assumed = {}
    if (kernel := tensors.get("patch_embed.proj.weight")) is not None:
        read |= {field: has[field] for field in ("class_token", "patch_bias", "norm_pre")}
        read["registers"] = _registers(tensors, file)
        table = tensors.get("pos_embed")
        if table is not None and table.ndim == 3 and kernel.ndim == 4:
            places = _places(table.shape[1], read["class_token"], read["registers"])
            if not places:
                raise ValueError(
                    f"{file} has a position table of {table.shape[1]} rows, which are not a square "
                    "of patches, with or without rows for the "
                    f"{read['class_token'] + read['registers']} tokens before them; take another "
                    "model"
                )
            positions = stated.get("positions")
            is_read = positions in places or len(places) == 1
            positions = positions if positions in places else next(iter(places))
            (read if is_read else assumed)["positions"] = positions
            read["data.image_size"] = places[positions] * kernel.shape[-1]
    if find(tensors, r"(fc_norm|norm|head|attn_pool)\..*"):
        read["norm_after_pool"] = "fc_norm.weight" in tensors
        pool, is_read = _pool(tensors, width, stated, read)
        (read if is_read else assumed)["pool"] = pool
    return read, assumed


def _registers(tensors: Tensors, file: Path) -> int:
    name = find(tensors, PARTS["registers"])
    if not name:
        return 0
    shape = tensors[name].shape
    if len(shape) != 3 or not shape[1]:
        raise ValueError(f"cannot infer the sizes of {file}: {name} is {shape}")
    return shape[1]


def _places(rows: int, class_token: bool, registers: int) -> dict[str, int]:
    """The side of the square of patches, by value of `positions`, for each possible reading of a
    position table with `rows` rows, the likeliest first."""
    # Rows before the patches -> `positions`. Where two readings have as many rows, the first is
    # kept.
    before = {class_token + registers: "all"}
    if class_token:
        before.setdefault(1, "class")
    before.setdefault(0, "patches")
    found = {
        positions: math.isqrt(rows - count)
        for count, positions in before.items()
        if rows > count and math.isqrt(rows - count) ** 2 == rows - count
    }
    return found if class_token else dict(reversed(found.items()))


def _pool(
    tensors: Tensors, width: int, stated: Mapping[str, Any], read: Mapping[str, Any]
) -> tuple[str, bool]:
    """The pooling, and whether it is certain and not just assumed."""
    head = tensors.get("head.weight")
    if head is not None and head.ndim == 2 and head.shape[1] == 2 * width:
        return "class_and_mean", True
    if "pool" in stated:
        return stated["pool"], True
    if find(tensors, r"attn_pool\..*"):
        return "attention", True
    if read.get("class_token") is False:
        return "mean", True
    # Nearly all timm models with fc_norm pool by the mean, those with norm by the class token.
    return ("mean", False) if read["norm_after_pool"] else ("class", True)
