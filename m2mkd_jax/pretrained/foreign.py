"""Parts of other people's ViTs, by their tensors' names: those that m2mKD's has no place for, and
the field of the config that decides about each of the others."""

import re
from collections.abc import Collection, Iterable

# Regex of names -> the part. No config makes a file with them fit.
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
# Regex of names -> fields of a ViT's section that say whether they are there, or of which shape.
DECIDED_BY = {
    r"cls_token": ("class_token",),
    r"reg_token|register_tokens": ("registers",),
    r"pos_embed": ("positions",),
    r"patch_embed\.proj\.bias": ("patch_bias",),
    r"norm_pre\..*": ("norm_pre",),
    r"blocks\.\d+\.(ls\d\.gamma|gamma_\d)": ("layer_scale",),
    r"blocks\.\d+\.attn\.qkv\.bias": ("qkv_bias",),
    r"attn_pool\..*": ("pool",),
    r"(fc_)?norm\.\w+": ("norm_after_pool", "pool"),
}
# Names that Hugging Face's ViTs and torchvision's have.
ELSEWHERE = {
    r"(\w+\.)?(embeddings\.(cls_token|patch_embeddings?\..*)|encoder\.layers?\.\d+\..*)": (
        "Hugging Face's"
    ),
    r"encoder\.layers\.encoder_layer_\d+\..*|conv_proj\.weight|class_token": "torchvision's",
}


def foreign_parts(names: Collection[str]) -> str:
    """The parts of a ViT that have no place here, with a name of each, or ""."""
    found = []
    for regex, what in FOREIGN.items():
        example = next((name for name in names if re.fullmatch(regex, name)), None)
        if example is not None:
            found.append(f"{what} ({example})")
    return ", ".join(found)


def is_foreign(name: str) -> bool:
    """True for a tensor of such a part."""
    return any(re.fullmatch(regex, name) for regex in FOREIGN)


def fields_of(names: Iterable[str]) -> list[str]:
    """Fields of a ViT's section that decide about tensors of these names."""
    found = {}
    for name in names:
        for regex, fields in DECIDED_BY.items():
            if re.fullmatch(regex, name):
                found |= dict.fromkeys(fields)
    return list(found)


def is_headless(names: Collection[str]) -> bool:
    """True for names of a whole ViT without its classifier, as timm's num_classes=0 leaves it."""
    ends = "norm.weight" in names or any(name.startswith("fc_norm.") for name in names)
    return ends and "head.weight" not in names and bool({"cls_token", "pos_embed"} & set(names))


def named_elsewhere(names: Collection[str]) -> str:
    """Whose names these are, "Hugging Face's" or "torchvision's", or ""."""
    for regex, whose in ELSEWHERE.items():
        if any(re.fullmatch(regex, name) for name in names):
            return whose
    return ""
