"""The family of ViTs: meta models and teachers."""

import dataclasses
from typing import Any

from common_jax.weights import Adapt
from common_jax.weights.table import Table
from m2mkd_jax.families.family import Context, Family, FileNames
from m2mkd_jax.models import encoder, vit, vit_names
from m2mkd_jax.models.positions import resizer
from m2mkd_jax.stages import Network, Place

HEAD = r"\w+/stage_\d+/head/.*"
STITCHES = r"\w+/stage_\d+/block_\d+/(pre|post)_stitch/.*"


def build(section: vit.ViTConfig, context: Context, drop_path: float) -> Network:
    """The whole ViT."""
    return vit.build(section, context.interface, dtype=context.dtype, drop_path=drop_path)


def build_modules(section: vit.ViTConfig, context: Context, drop_path: float) -> Network:
    """The stages of the ViT; with stitches to the meta model's width if `context` asks for them."""
    return vit.build(
        section,
        context.interface,
        dtype=context.dtype,
        # Modules trained in the meta model have its width; only those of other ViTs need stitches.
        stitch_width=context.meta_width if context.stitched else None,
        drop_path=drop_path,
    )


def tokens(section: vit.ViTConfig, interface: encoder.Interface) -> int:
    """Number of tokens between two stages."""
    return encoder.tokens(section.encoder, interface)


def leading(section: vit.ViTConfig) -> dict[str, Any]:
    """Fields that say which tokens come before the patches."""
    return {"class_token": section.class_token, "registers": section.registers}


def leading_tokens(section: vit.ViTConfig) -> int:
    """Number of tokens before the patches."""
    return section.encoder.leading


def resize(section: vit.ViTConfig) -> dict[str, Adapt]:
    """Resizes position tables to the number of patches of an image."""
    return {r".*/pos_embed": resizer(section.encoder.leading_positions)}


def table(section: vit.ViTConfig, channels: int, stage: int | None, *, experts: int = 0) -> Table:
    """Tensor names of the whole network, or of a stage; `experts` is for V-MoEs."""
    layout = {
        "heads": section.heads,
        "channels": channels,
        "experts": experts,
        "norm_after_pool": section.norm_after_pool,
    }
    if stage is None:
        return vit_names.network_table(section.depths, **layout)
    place = Place.of(stage, len(section.depths))
    return vit_names.stage_table(section.depths[stage], place, **layout)


_MARKER = r"(?:stages\.\d+\.)?blocks\.\d+\.norm1\.weight"
# A first, a middle and a last stage, whose files hold different tensors.
_SMALL = vit.ViTConfig(depths=(1, 1, 1))
FILES = FileNames(
    network="ViT",
    table=table,
    # `norm_after_pool` is the only field that renames a tensor; all others add or leave out some.
    examples=(_SMALL, dataclasses.replace(_SMALL, norm_after_pool=True)),
    marker=_MARKER,
    stage_marker=_MARKER,
    first=("patch_embed.proj.weight", "cls_token"),
    last=("head.weight",),
    sizes=lambda tensors: {},
    variants=vit.VARIANTS | vit.PRETRAINED,
    timm=True,
)
FAMILY = Family(
    config=vit.ViTConfig,
    roles=("meta", "teacher"),
    whole=build,
    modules=build_modules,
    rules=vit.PARTITION_RULES,
    head=lambda section: HEAD,
    stitches=STITCHES,
    files=FILES,
    streams=encoder.STREAMS,
    adapt=resize,
    ramp=encoder.ramp_drop_path,
    tokens=tokens,
    leading=leading,
    leading_tokens=leading_tokens,
)
