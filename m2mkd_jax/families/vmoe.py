"""The family of V-MoEs: m2mKD students whose experts may start from a dense ViT."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from common_jax.weights import Allowance
from common_jax.weights.table import Table
from m2mkd_jax.families import vit
from m2mkd_jax.families.family import Context, Family
from m2mkd_jax.families.upcycle import upcycle
from m2mkd_jax.families.vit import HEAD, leading, leading_tokens, resize
from m2mkd_jax.models import encoder, vmoe
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.moe.config import check_moe
from m2mkd_jax.stages import Network


def build_whole(section: VMoEConfig, context: Context, drop_path: float) -> Network:
    """The whole V-MoE, with stitches between stages if `section` keeps them."""
    return vmoe.build(
        section,
        context.interface,
        stitch_width=context.meta_width if section.stitches == "kept" else None,
        dtype=context.dtype,
        drop_path=drop_path,
    )


def build_modules(section: VMoEConfig, context: Context, drop_path: float) -> Network:
    """The V-MoE cut into students, with stitches to the meta model's width."""
    return vmoe.build_students(
        section,
        context.interface,
        meta_width=context.meta_width,
        dtype=context.dtype,
        drop_path=drop_path,
    )


def left(section: VMoEConfig) -> tuple[Allowance, ...]:
    """The students' stitches, unless the whole network has them too."""
    if section.stitches == "kept":
        return ()
    regex = r"student/stage_\d+/block_\d+/(pre|post)_stitch/.*"
    return (Allowance(regex, "config.model.stitches='dropped'"),)


def check_mesh(section: VMoEConfig, mesh_sizes: Mapping[str, int], batch: int) -> None:
    """Raises ValueError if the mixture of experts does not fit mesh and batch."""
    # Without experts it is a ViT, which fits any mesh.
    if section.moe_positions():
        check_moe(section.moe, mesh_sizes, batch)


def idle(section: VMoEConfig) -> dict[str, str]:
    """What the router does not read, and all of the mixture if no block has one."""
    fields = {f"moe.{name}": why for name, why in section.moe.idle.items()}
    if not section.moe_positions():
        fields["moe"] = f"config.model.moe_blocks={section.moe_blocks!r} leaves no experts"
    return fields


def warnings(section: VMoEConfig) -> tuple[str, ...]:
    """A router without a gradient."""
    why = section.moe.untrained if section.moe_positions() else ""
    return (f"moe.{why}",) if why else ()


def table(section: VMoEConfig, channels: int, stage: int | None) -> Table:
    """Tensor names of the whole network, or of a stage."""
    return vit.table(section, channels, stage, experts=section.moe.experts)


def sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Section fields that the tensors of a whole V-MoE reveal beyond those of a ViT."""
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.moe\.", name))}
    fields = {"moe_blocks": ",".join(sorted(blocks, key=int)) or "none"}
    fields["moe.router_bias"] = any(name.endswith("moe.gate.gate.bias") for name in tensors)
    for name, tensor in tensors.items():
        # A scalar, which only a damaged file has, is left to the reader's check of shapes.
        if name.endswith("moe.gate.gate.weight") and tensor.ndim:
            fields["moe.experts"] = tensor.shape[0]
        elif name.endswith("moe.gate.phi") and tensor.ndim == 3:
            experts, slots = tensor.shape[1:]
            fields |= {"moe.router": "soft", "moe.experts": experts, "moe.slots_per_expert": slots}
            fields.pop("moe.router_bias", None)  # it has no such field
        elif name.endswith("pre_stitch.ln.weight") and tensor.ndim:
            # The norm of a stitch before a stage is as wide as the meta model.
            fields |= {"stitches": "kept", "meta.width": tensor.shape[0]}
    return fields


_SMALL = VMoEConfig(depths=(1, 1, 1))
FILES = dataclasses.replace(
    vit.FILES,
    network="V-MoE",
    table=table,
    examples=(_SMALL, dataclasses.replace(_SMALL, norm_after_pool=True)),
    sizes=sizes,
    variants=vmoe.VARIANTS,
    stage_config="configs/m2mkd/vmoe_base.py",
    timm=False,
)
FAMILY = Family(
    config=VMoEConfig,
    roles=("model",),
    whole=build_whole,
    modules=build_modules,
    rules=vmoe.PARTITION_RULES,
    head=lambda section: HEAD,
    files=FILES,
    streams=encoder.STREAMS,
    adapt=resize,
    left=left,
    leading=leading,
    leading_tokens=leading_tokens,
    check_mesh=check_mesh,
    upcycle=upcycle,
    idle=idle,
    modules_drop=lambda section: max(section.depths) > 1,
    warnings=warnings,
    savers=("config.mesh.expert",),
)
